"""The step compiled and not run: for this machine, or for TPUs that are not there."""

import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies

from launch.bench.timing import program_figures
from mpmc_jax.experiments.step_program import lower_step
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.text import first_line
from mpmc_jax.training.parallel import Layout

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
# libtpu's "Ran out of memory in memory space hbm. Used 19.02G of 15.75G hbm."
_NEEDED = re.compile(r"Used \S+ of \S+ hbm")
_SHAPE = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")


def bench_compile(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
    """FLOPs, bytes, memory and collectives of a device's program, and compile times.

    Args:
      config: of the run; `train.batch_size` counts the images of all devices.
      topology: a TPU's name as JAX has it, such as "v5e:4x4", all of whose chips
        are compiled for by the package `libtpu`; empty for this machine's devices.

    Raises:
      ValueError: the batch does not divide over the devices, the topology is unknown,
        or libtpu is not installed.
    """
    here = jax.devices()[: config.train.devices or None]
    devices: Sequence[Any] = _absent(topology) if topology else here
    train = config.train
    layout = Layout(train.batch_size, train.group_size, train.accumulation)
    layout.check(len(devices), processes=1)
    begin = time.perf_counter()
    with compiled_for(devices[0].platform):
        lowered = lower_step(config, list(devices))
    traced = time.perf_counter()
    compiled, refused = _compile(lowered)
    seconds = time.perf_counter() - traced
    return {
        "chip": devices[0].device_kind,
        "chips": len(devices),
        "images_a_chip": config.train.batch_size // len(devices),
        **({"refused": refused} if compiled is None else _figures(compiled)),
        "trace_seconds": traced - begin,
        "compile_seconds": seconds,
    }


def _compile(lowered: Any) -> tuple[Any, str]:
    """The program; None and why where the memory is too small for it."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _NEEDED.search(str(error))
        return None, needed.group() if needed else first_line(error)


def _figures(compiled: Any) -> dict[str, Any]:
    return {
        **program_figures(compiled),
        "collectives": collectives(compiled.as_text()),
    }


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Kind of collective -> how many of them a compiled program has, and their bytes.

    Bytes are those of one device's result.
    """
    found: dict[str, dict[str, int]] = {}
    for shapes, kind, started in _COLLECTIVE.findall(program):
        # pred[] names no bits, and takes a byte.
        sizes = [
            int(bits or 8) // 8 * math.prod(map(int, filter(None, sides.split(","))))
            for bits, sides in _SHAPE.findall(shapes)
        ]
        # An asynchronous gather lists its operands, then its results.
        if started and kind != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += sum(sizes)
    return found


def _absent(topology: str) -> Sequence[Any]:
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        # libtpu raises what it likes: of its absence, and of names it does not know.
        raise ValueError(
            f"--topology={topology}: {error}; names are like h100:1 or, for TPUs, "
            "v5e:4x4, and for TPUs the package libtpu must be installed"
        ) from error
    return described.devices
