"""The program of a training step on noise, whose memory and FLOPs XLA counts."""

from typing import Any

import jax
import ml_collections
import numpy as np

from mpmc_jax.experiments.build import (
    Setup,
    build_base,
    build_setup,
    state_shape,
)
from mpmc_jax.pixels import GRAY, RGB
from mpmc_jax.training.config import AXIS
from mpmc_jax.training.train_step import make_step, make_step_info
from mpmc_jax.types import Batch, Crops, PyTree

# Classes and format of the noise, with those of the data set that has others.
CLASSES = 21
_OTHERS = {"acdc": (4, GRAY)}


def noise_setup(
    config: ml_collections.ConfigDict, axis_name: str | None = AXIS
) -> Setup:
    """Builds the parts of a run that needs no data set."""
    classes, pixels = _OTHERS.get(config.data.name, (CLASSES, RGB))
    model, method = build_base(
        config,
        num_classes=classes,
        pixels=pixels,
        num_unlabeled=1000,
        axis_name=axis_name,
    )
    return build_setup(config, model, method, steps_per_epoch=1000, axis_name=axis_name)


def random_batch(config: ml_collections.ConfigDict, setup: Setup) -> Batch:
    """Makes a batch of noise, of the shapes that the method asks for."""
    rng = np.random.default_rng(0)
    train, crop = config.train, config.data.crop
    classes, channels = setup.model.num_classes, setup.model.in_channels

    def crops(name: str, size: int) -> Crops:
        shape = (size, crop, crop)
        labeled = name in ("labeled", "source")
        # Unlabeled crops are bytes whatever the data set stores, see `Crops`.
        stored = setup.step.method.pixels.dtype if labeled else "uint8"
        image = rng.integers(0, 256, (*shape, channels), np.uint8)
        arrays = {
            "image": image.astype(stored, copy=False),
            "extent": np.tile(np.array([0, 0, crop, crop], np.int32), (size, 1)),
            "index": np.arange(size, dtype=np.int32),
            "batch_index": np.arange(size, dtype=np.int32),
        }
        if labeled:
            arrays["label"] = rng.integers(0, classes, shape, np.uint8)
        return Crops(**arrays)

    sizes = setup.step.method.streams.sizes(train.batch_size, train.group_size)
    return Batch(**{name: crops(name, size) for name, size in sizes.items()})


def lower_step(
    config: ml_collections.ConfigDict, devices: list[Any], setup: Setup | None = None
) -> Any:
    """Lowers the pmapped step for devices that need not be there; nothing runs.

    Args:
      config: of the run.
      devices: the devices.
      setup: its parts; None for those of a run on noise.
    """
    setup = setup or noise_setup(config)
    count = len(devices)

    def replicated(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree
        )

    def divided(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (count, len(x) // count, *x.shape[1:]), x.dtype
            ),
            tree,
        )

    step: Any = jax.pmap(
        make_step(setup.step), axis_name=AXIS, devices=devices, donate_argnums=(0,)
    )
    batch = divided(random_batch(config, setup))
    return step.lower(
        replicated(state_shape(setup)), batch, replicated(make_step_info(0))
    )


def peak_bytes(compiled: Any) -> int:
    """Returns the bytes of a device: of arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
