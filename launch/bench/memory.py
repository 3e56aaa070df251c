"""The memory of a step at growing batches: what fits a device, without running it."""

from typing import Any

import jax
import ml_collections

from mpmc_jax.experiments.build import build_parallel
from mpmc_jax.experiments.step_program import (
    lower_step,
    peak_bytes,
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
