"""What is recomputed in the backward pass: less memory, and the same numbers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from mpmc_jax.models import ModelConfig, build_segmenter, init_variables
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.types import Network
from tests.support import tiny
from tests.support.variables import random_variables
from tests.support.x64 import call_x64

SIDE = 32
CONFIGS = {
    "resnet": ModelConfig(backbone="resnet18", width=8, num_classes=4),
    # Elements are dropped in its blocks.
    "unet": ModelConfig(name="unet", width=8, num_classes=4),
    # As are branches in these.
    "vit": ModelConfig(
        name="dpt",
        backbone="tiny_dinov2",
        width=8,
        num_classes=4,
        image_size=SIDE,
        drop_path=0.3,
    ),
}


def _update(name: str, remat: str, dtype):
    """The loss of a network, and a function of its variables: gradients, statistics."""
    config = dataclasses.replace(CONFIGS[name], remat=remat)
    module = build_segmenter(config)
    variables = jax.tree.map(dtype, random_variables(config))
    image = jax.random.normal(jax.random.key(1), (2, SIDE, SIDE, 3), dtype)
    keys = jax.random.split(jax.random.key(2), 2)

    def loss(params):
        network = Network(module, params, variables.get("batch_stats", {}), train=True)
        features, network = network.encode(image, dropout_keys=keys)
        prediction, network = network.decode(features)
        taps = sum(jnp.mean(tap**2) for tap in features.taps.values())
        return taps + jnp.mean(prediction.logits**2), network.batch_stats

    return jax.value_and_grad(loss, has_aux=True), variables["params"]


def errors(name: str, platform: str) -> dict[str, float]:
    """Worst difference of loss, gradients and statistics from those of "off"."""

    def run(remat):
        with compiled_for(platform):
            update, params = _update(name, remat, jnp.float64)
            return jax.jit(update)(params)

    plain = run("off")
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(plain[1]))
    return {remat: tiny.difference(run(remat), plain) for remat in ("cheap", "all")}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "platform"),
    [("resnet", "cpu"), ("resnet", "gpu"), ("unet", "gpu"), ("vit", "cpu")],
)
def test_no_number_changes(name, platform):
    found = call_x64(__name__, f"errors({name!r}, {platform!r})")
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        pytest.param("unet", marks=pytest.mark.full),
        pytest.param("vit", marks=pytest.mark.full),
    ],
)
def test_cheap_repeats_no_convolution_and_no_dense_layer(name):
    def flops(remat):
        update, params = _update(name, remat, jnp.float32)
        return jax.jit(update).lower(params).cost_analysis()["flops"]

    found = {remat: flops(remat) for remat in ("off", "cheap", "all")}
    assert found["off"] < found["cheap"] < found["all"]


@pytest.mark.parametrize("remat", ["cheap", "all"])
def test_initial_variables_are_the_same(remat):
    config = ModelConfig(backbone="tiny", width=8, num_classes=4)
    key = jax.random.key(0)
    plain = init_variables(key, config)
    again = init_variables(key, dataclasses.replace(config, remat=remat))
    chex.assert_trees_all_equal(again, plain)


def test_a_name_that_is_unknown():
    with pytest.raises(ValueError, match="remat='True': valid are off, cheap, all"):
        ModelConfig(remat="True")
