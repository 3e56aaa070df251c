"""MPMC's own operations beside the step, for `launch.bench --what=mpmc`."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from launch.bench.step import bench_step, seconds
from mpmc_jax.experiments.build import Setup, state_shape
from mpmc_jax.experiments.step_program import CLASSES, noise_setup, random_batch
from mpmc_jax.models import layers
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.patch_classifier import PROJECTION
from mpmc_jax.models.pooling import average_pool
from mpmc_jax.models.registry import tap_channels
from mpmc_jax.plugins.mpmc import MPMC, adaptive_weights, patch_targets
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Array, Batch, PyTree, Region


def count_images(config: ml_collections.ConfigDict, setup: Setup) -> int:
    """Unlabeled images, of all views, that the method trains on in a step."""

    def regions(state: TrainState, batch: Batch) -> dict[str, Region]:
        keys = make_keys(setup.step, state, batch)
        return setup.step.method.regions(
            setup.step.method.augment(batch, state.method_state, keys)
        )

    batch = random_batch(config, setup)
    named = jax.eval_shape(regions, state_shape(setup), batch)
    labeled = ("supervised", "labeled")
    return sum(r.valid.shape[0] for name, r in named.items() if name not in labeled)


def bench_mpmc(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Seconds of MPMC's own operations at the step's shapes, and their share of it.

    Pooling runs on the taps of the labeled images and of all views, with its gradient,
    and once more without on the views for the teacher; targets on the labeled images;
    weights on the views. The head's rate is that of a forward and backward pass on all
    taps, beside the rate of the decoder's 3x3 convolutions on as many positions.
    """
    setup = noise_setup(config)
    plugin = setup.step.plugin
    if not isinstance(plugin, MPMC):
        raise ValueError("--what=mpmc needs --mpmc=paper or --mpmc=recommended")
    size, images = config.train.batch_size, count_images(config, setup)
    dtype, positions = config.model.dtype, (size + images, *plugin.tap_size)
    channels = tap_channels(setup.model, plugin.tap)
    parts = _parts(config, plugin, images, channels, repeats)
    head = plugin.classifier().clone(axis_name=None)
    of_head, head_rate = rate(head, _noise((*positions, channels), dtype), repeats)
    _, decoder_rate = rate(_Fuse(), _noise((*positions, 304), dtype), repeats)
    step = bench_step(config, repeats)
    return {
        **{f"{name}_seconds": value for name, value in parts.items()},
        "share": sum(parts.values()) / step["step_seconds"],
        "head_seconds": of_head,
        "head_share": of_head / step["step_seconds"],
        "head_flops_per_second": head_rate,
        "head_rate_over_decoders": head_rate / decoder_rate,
        **step,
    }


def _noise(shape: tuple[int, ...], dtype: str) -> Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def _parts(
    config: ml_collections.ConfigDict,
    plugin: MPMC,
    images: int,
    channels: int,
    repeats: int,
) -> dict[str, float]:
    """Median seconds of pooling, targets and weights."""
    size, crop = config.train.batch_size, config.data.crop
    if plugin.head == "lite":
        channels = PROJECTION  # it projects before it pools
    rng = np.random.default_rng(0)
    taps = _noise((size + images, *plugin.tap_size, channels), config.model.dtype)
    labels = jnp.asarray(rng.integers(0, CLASSES, (size, crop, crop)))
    pseudo = jnp.asarray(rng.integers(0, CLASSES, (images, crop, crop)))
    logits = _noise((images, *plugin.tap_size, CLASSES), "float32")
    windows = [window for window in plugin.windows if window > 1]

    def pooled(z: Array) -> Array:
        return functools.reduce(
            jnp.add, [average_pool(z, window) for window in windows]
        )

    def pulled_back(z: Array) -> Array:
        out, pull = jax.vjp(pooled, z)
        return pull(out)[0]

    def weights(z: Array, pseudo: Array) -> tuple[Array, Array]:
        return adaptive_weights(
            z,
            pseudo,
            confidence=plugin.confidence,
            scale=plugin.lambda_scale,
            field=plugin.field,
        )

    targets = functools.partial(
        patch_targets,
        num_classes=CLASSES,
        field=plugin.field,
        size=plugin.tap_size,
    )
    parts = {
        "pooling": seconds(jax.jit(pulled_back), repeats, taps),
        "targets": seconds(jax.jit(targets), repeats, labels),
    }
    if images:
        parts["pooling_teacher"] = seconds(jax.jit(pooled), repeats, taps[size:])
        parts["weights"] = seconds(jax.jit(weights), repeats, logits, pseudo)
    return {name: statistics.median(times) for name, times in parts.items()}


class _Fuse(nn.Module):
    """The 3x3 convolutions of DeepLabV3+'s decoder, which set the pace."""

    @nn.compact
    def __call__(self, x_bhwd: Array, *, train: bool) -> Array:
        for i in range(2):
            conv = layers.ConvNorm(ConvSpec(256, 3), None, name=f"fuse{i}")
            x_bhwd = conv(x_bhwd, train=train)
        return x_bhwd


def rate(module: nn.Module, x_bhwd: Array, repeats: int) -> tuple[float, float]:
    """Median seconds of a module's forward and backward pass, and FLOPs a second."""
    variables = jax.jit(functools.partial(module.init, train=False))(
        jax.random.key(0), x_bhwd[:1]
    )

    def loss(params: PyTree, x_bhwd: Array) -> Array:
        changed = {**variables, "params": params}
        out, _ = module.apply(changed, x_bhwd, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.asarray(out, jnp.float32) ** 2)

    both: Callable[..., Any] = jax.jit(jax.grad(loss, (0, 1)))
    cost: Any = both.lower(variables["params"], x_bhwd).compile().cost_analysis()
    times = seconds(both, repeats, variables["params"], x_bhwd)
    took = statistics.median(times)
    return took, cost["flops"] / took
