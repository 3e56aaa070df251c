"""A network and batches small enough to train in a test, on plain arrays."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from configs import synthetic
from mpmc_jax.experiments.build import (
    Setup,
    build_base,
    build_setup,
    init_state,
    state_shape,
)
from mpmc_jax.models import registry
from mpmc_jax.models.encoders import resnet, vit
from mpmc_jax.models.platform import target_platform
from mpmc_jax.pixels import RGB
from mpmc_jax.training.config import AXIS
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import make_step, make_step_info
from mpmc_jax.types import Batch, Crops

# One block a stage: half of ResNet-18's operations to compile.
BACKBONE = "tiny"
resnet.BACKBONES[BACKBONE] = resnet.Backbone(
    (1,) * 4, bottleneck=False, deep_stem=False
)
registry.ENCODERS[BACKBONE] = resnet.build
# Transformers of four blocks: as DINOv2's, on a grid of 5 x 5 patches, and as augreg's;
# and of two blocks, which decoders read twice.
for _name, _family, _grid, _levels in (
    ("tiny_dinov2", vit.DINOV2, 5, (0, 1, 2, 3)),
    ("tiny_vit", vit.AUGREG, None, (0, 1, 2, 3)),
    ("shallow_dinov2", vit.DINOV2, 5, (0, 0, 1, 1)),
    ("shallow_vit", vit.AUGREG, None, (0, 0, 1, 1)),
):
    vit.BACKBONES[_name] = vit.Backbone(
        dataclasses.replace(_family, patch=8, grid=_grid),
        heads=2,
        depth=_levels[-1] + 1,
        levels=_levels,
    )
    registry.ENCODERS[_name] = vit.build

CLASSES = 4
CROP = 33
STEPS_PER_EPOCH = 5


def shrink(cfg):
    """A configuration at toy size."""
    cfg.data.crop = CROP
    cfg.model.width = 8
    cfg.model.backbone = BACKBONE
    cfg.train.batch_size = 8
    cfg.train.group_size = 2
    cfg.train.steps = 20
    return cfg


def config(argument: str = "", **changes):
    """The synthetic configuration at toy size; `changes` are dotted keys."""
    cfg = shrink(synthetic.get_config(argument))
    cfg.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return cfg


def setup(cfg, axis_name: str | None = AXIS) -> Setup:
    """The parts of a run of `cfg` on RGB images of four classes."""
    model, method = build_base(
        cfg,
        num_classes=CLASSES,
        pixels=RGB,
        num_unlabeled=100,
        axis_name=axis_name,
    )
    return build_setup(
        cfg, model, method, steps_per_epoch=STEPS_PER_EPOCH, axis_name=axis_name
    )


def crops(
    rng: np.random.Generator, size: int, *, label: bool, side: int = CROP
) -> Crops:
    """Blocks of color by class; padding and void unevenly spread over examples."""
    coarse = rng.integers(0, CLASSES, (size, 5, 5))
    label_bhw = np.kron(coarse, np.ones((1, 7, 7), int))[:, :side, :side]
    color = np.array([[200, 60, 40], [40, 180, 60], [50, 70, 200], [190, 190, 60]])
    noise = rng.normal(0, 25, (size, side, side, 3))
    image = np.clip(color[label_bhw] + noise, 0, 255).astype(np.uint8)
    extent = np.tile(np.array([0, 0, side, side]), (size, 1))
    extent[::3, 2] = rng.integers(10, side, len(extent[::3]))
    rows = np.arange(side)[None, :, None]
    padding = np.broadcast_to(rows >= extent[:, 2, None, None], label_bhw.shape)
    image[padding] = 0
    label_bhw = np.where(padding, 255, label_bhw)
    label_bhw[0, :, : side // 2] = 255
    return Crops(
        image=image,
        extent=extent.astype(np.int32),
        index=rng.integers(0, 100, size).astype(np.int32),
        batch_index=np.arange(size, dtype=np.int32),
        label=label_bhw.astype(np.uint8) if label else None,
    )


def batch(seed: int, cfg, method) -> Batch:
    """A global batch of what `method` asks for."""
    rng = np.random.default_rng(seed)
    sizes = method.streams.sizes(cfg.train.batch_size, cfg.train.group_size)
    labeled = ("labeled", "source")
    return Batch(
        **{
            name: crops(rng, size, label=name in labeled, side=cfg.data.crop)
            for name, size in sizes.items()
        }
    )


def wide(state: TrainState) -> TrainState:
    """The state in the default float type: float64 where a test runs in it."""

    def cast(x):
        return x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, state)


def difference(a, b) -> float:
    """Largest absolute difference of two trees relative to 1 + |b|."""
    chex.assert_trees_all_equal_structs(a, b)

    def largest(x, y):
        x, y = np.asarray(x, float), np.asarray(y, float)
        return np.max(np.abs(x - y) / (1 + np.abs(y)), initial=0.0)

    parts = jax.tree.map(largest, a, b)
    return float(np.max([0.0, *jax.tree.leaves(parts)]))  # NaN if any is


def check_trace(cfg) -> None:
    """Traces a step without compiling it: a state comes out as one went in."""
    parts = setup(cfg, axis_name=None)
    state, rows = state_shape(parts), batch(0, cfg, parts.step.method)
    step = make_step(parts.step)
    after, metrics = jax.eval_shape(step, state, rows, make_step_info(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert metrics.values["loss"].shape == ()


def stepper(
    cfg,
    *,
    kind: str | None = None,
    devices: int = 1,
    change=lambda parts: parts,
    trace=lambda step: step,
):
    """Returns (state, steps) -> the last state and the metrics, of one program.

    The steps are on the batches state.step, state.step + 1, ... `change` may alter the
    `Setup`, and `trace` the function that is compiled.
    """
    parts = change(setup(cfg))
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, cfg.train.accumulation)
    parallel = Parallel(kind or cfg.train.parallel, layout, devices)
    step = parallel.compile(trace(make_step(parts.step)))

    def advance(state: TrainState, steps: int):
        start = int(state.step)
        on_device = parallel.replicate(state)
        metrics = []
        for number in range(start, start + steps):
            # Process p of P receives the records p, p + P, ...
            mine = slice(jax.process_index(), None, jax.process_count())
            rows = jax.tree.map(
                lambda x, mine=mine: x[mine], batch(number, cfg, parts.step.method)
            )
            placed = parallel.place(rows)
            order = parallel.replicate(make_step_info(number))
            on_device, out = step(on_device, placed, order)
            metrics.append(jax.device_get(parallel.fetch(out)))
        return parallel.fetch(on_device), metrics

    return advance


# By what they are compiled from; the oldest makes room for a ninth.
_STEPPERS: dict[tuple, Callable] = {}


def _kept_stepper(cfg, *, kind: str | None = None, devices: int = 1):
    """The stepper of a configuration, compiled by the first test that asks for it."""
    key = (str(cfg), kind, devices, target_platform())
    if key not in _STEPPERS:
        if len(_STEPPERS) == 8:
            del _STEPPERS[next(iter(_STEPPERS))]
        _STEPPERS[key] = stepper(cfg, kind=kind, devices=devices)
    return _STEPPERS[key]


def run(cfg, steps: int, *, state: TrainState | None = None, change=None, **where):
    """`steps` steps from the initial state or `state`, as `stepper` takes them."""
    if state is None:
        parts = setup(cfg)
        state = wide(init_state(change(parts) if change else parts, cfg.seed))
    if change:
        return stepper(cfg, change=change, **where)(state, steps)
    return _kept_stepper(cfg, **where)(state, steps)
