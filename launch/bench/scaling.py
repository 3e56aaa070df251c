"""How a step's time grows with the batch, the crop and the number of devices."""

from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from launch.bench.step import TimedStep
from launch.bench.timing import spread


def bench_scaling(config: ml_collections.ConfigDict, repeats: int) -> dict[str, Any]:
    """Steps of 1, 2 and 4 times the batch; of 1, 3/2 and 2 times the crop; in turns.

    With several devices instead of one beside all of them, at an equal global batch.

    Args:
      config: of the run; its batch and crop are the smallest, its devices those of the
        comparison.
      repeats: turns that are timed; one before them warms up.

    Returns:
      Median seconds by batch and by crop, and the largest share by which one is off
      the line through its fixed cost, over images and over pixels. With several
      devices one's seconds, theirs over one's (least, median, most), and their FLOPs.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    devices = config.train.devices or len(jax.devices())
    if devices > 1:
        return _over_devices(config, devices, repeats)
    batch, crop = config.train.batch_size, config.data.crop
    batches = [batch, 2 * batch, 4 * batch]
    crops = [crop, (3 * crop - 1) // 2, 2 * crop - 1]
    # The first is the base of both comparisons: compiled and timed once.
    changes = [
        {},
        *({"batch_size": each} for each in batches[1:]),
        *({"crop": side} for side in crops[1:]),
    ]
    times, _ = _in_turns([_with(config, **change) for change in changes], repeats)
    median = np.median(times, axis=1)
    by_batch, by_crop = median[[0, 1, 2]], median[[0, 3, 4]]
    return {
        "seconds_by_batch": dict(zip(batches, by_batch.tolist(), strict=True)),
        "batches_off_the_line": off_the_line(batches, by_batch),
        "seconds_by_crop": dict(zip(crops, by_crop.tolist(), strict=True)),
        "crops_off_the_line": off_the_line(np.square(crops), by_crop),
    }


def _over_devices(
    config: ml_collections.ConfigDict, devices: int, repeats: int
) -> dict[str, Any]:
    counts = (1, devices)
    times, flops = _in_turns([_with(config, devices=n) for n in counts], repeats)
    return {
        "one_device_seconds": float(np.median(times[0])),
        "devices_over_one": spread(np.divide(times[1], times[0]).tolist()),
        "devices_flops_over_one": devices * flops[1] / flops[0],
    }


def off_the_line(sizes: Sequence[int] | np.ndarray, seconds: np.ndarray) -> float:
    """The largest share by which a time is off the least-squares line over sizes."""
    line = np.polynomial.Polynomial.fit(sizes, seconds, deg=1)
    return float(np.max(np.abs(line(np.asarray(sizes)) / seconds - 1)))


def _with(
    config: ml_collections.ConfigDict,
    devices: int = 1,
    batch_size: int | None = None,
    crop: int | None = None,
) -> ml_collections.ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.train.devices = devices
    changed.train.batch_size = batch_size or config.train.batch_size
    changed.data.crop = crop or config.data.crop
    return changed


def _in_turns(
    configs: Sequence[ml_collections.ConfigDict], repeats: int
) -> tuple[np.ndarray, list[float]]:
    """Seconds, (config, repeat), and a device's FLOPs."""
    steps = [TimedStep(config) for config in configs]
    times = [[step.seconds() for step in steps] for _ in range(repeats + 1)]
    return np.transpose(times[1:]), [step.figures["flops"] for step in steps]
