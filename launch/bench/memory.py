"""The memory of a step at growing batches: what fits a device, without running it."""

from typing import Any

import jax
import ml_collections

from launch.bench.step import noise_setup, random_batch
from launch.bench.timing import peak_bytes
from mpmc_jax.experiments.build import Setup, build_parallel, state_shape
from mpmc_jax.training.config import AXIS
from mpmc_jax.training.train_step import make_step, make_step_info
from mpmc_jax.types import PyTree


def lower_step(
    config: ml_collections.ConfigDict, devices: list[Any], setup: Setup | None = None
) -> Any:
    """The pmapped step, lowered for devices that need not be there; nothing runs.

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


def bench_fits(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Peak bytes at batches of one group a device, two, four, ... until one exceeds it.

    Args:
      config: of the run; its batch size is not read.
      repeats: programs to compile at most.

    Returns:
      The device's memory, peaks by batch size a device, and the largest that fits.
    """
    group = config.train.group_size
    available, peaks, fits = 0, {}, 0
    for doubling in range(repeats):
        each = group << doubling
        count = config.train.devices or len(jax.devices())
        config.train.batch_size = count * each
        parallel = build_parallel(config)
        available = parallel.memory()
        peaks[each] = peak_bytes(lower_step(config, parallel.devices).compile())
        if peaks[each] > available:
            break
        fits = each
    return {
        "device_bytes": available,
        "peak_bytes_by_images_a_device": peaks,
        "largest_that_fits": fits,
    }
