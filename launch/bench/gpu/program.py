"""The step compiled for NVIDIA GPUs that are not there, counted kernel by kernel."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from launch.bench.compile import collectives
from launch.bench.gpu import devices as gpus
from launch.bench.gpu import hlo, roofline
from mpmc_jax.experiments.step_program import lower_step, peak_bytes
from mpmc_jax.models.platform import compiled_for

# The rest is left to the driver, to workspaces of libraries, which are not known
# without a GPU, and to gaps between buffers.
_USABLE = 0.9
_COMPARED = ("kernels", "seconds", "bytes", "flops", "peak_bytes")


def bench_gpu_program(
    config: ml_collections.ConfigDict,
    name: str,
    count: int,
    *,
    top: int,
    fits: bool = False,
) -> dict[str, Any]:
    """Counts the program of one GPU: kernels, bytes, FLOPs and time at the roofline.

    Args:
      config: of the run; `train.batch_size` counts the images of all devices.
      name: a key of `devices.RATES`.
      count: number of GPUs.
      top: number of the most expensive operations to list.
      fits: whether to estimate the largest batch, which takes a second compilation.
    """
    devices = gpus.absent_gpus(name, count)
    begin = time.perf_counter()
    compiled = _compile(config, devices)
    text, peak = compiled.as_text(), peak_bytes(compiled)
    found = {
        "chip": devices[0].device_kind,
        "chips": count,
        "images_a_chip": config.train.batch_size // count,
        "device_bytes": gpus.memory_bytes(name),
        **roofline.figures(hlo.kernels(text), gpus.RATES[name], count, top),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak,
        "collectives": collectives(text),
        "compile_seconds": time.perf_counter() - begin,
    }
    if fits:
        found["largest_batch_a_chip"] = _largest_batch(
            config, devices, peak, _USABLE * gpus.memory_bytes(name)
        )
    return found


def _compile(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Any:
    with compiled_for("gpu"):
        lowered = lower_step(config, list(devices))
    return lowered.compile(compiler_options=gpus.COMPILER_OPTIONS)


def _largest_batch(
    config: ml_collections.ConfigDict, devices: Sequence[Any], peak: int, usable: float
) -> int:
    """Estimates the most labeled images per device, from this batch and its double.

    The peak grows linearly: what holds images by their number, weights by nothing.
    """
    each = config.train.batch_size // len(devices)
    doubled = ml_collections.ConfigDict(config)
    doubled.train.batch_size = 2 * config.train.batch_size
    growth = (peak_bytes(_compile(doubled, devices)) - peak) / each
    largest = int(each + (usable - peak) / growth)
    return max(0, largest // config.train.group_size * config.train.group_size)


def read_program(file: Path) -> dict[str, Any]:
    """Reads the figures of an earlier program, to compare with.

    Args:
      file: its last line is what the bench printed for that program.

    Raises:
      ValueError: the file holds no such line.
    """
    try:
        found = json.loads(file.read_text().splitlines()[-1])
        return {**found, **{name: found[name] for name in (*_COMPARED, "kinds")}}
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"--against={file}: its last line is not one of --what=compile for a GPU; "
            "write one with `> FILE`"
        ) from error


def ratios(found: dict[str, Any], before: dict[str, Any]) -> dict[str, float]:
    """Divides the figures of a program by those of another."""
    return {name: found[name] / before[name] for name in _COMPARED}
