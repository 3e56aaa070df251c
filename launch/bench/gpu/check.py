"""What to run where there is a GPU: checks and times in about five minutes.

UniMatch's step is timed with and without MPMC, beside PyTorch's if that is installed,
and beside the time that the count of its kernels predicts. Then every method takes
small steps in float32 and bfloat16. A part that fails says so, and the others go on.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from launch.bench.gpu import devices as gpus
from launch.bench.gpu import hlo, roofline
from launch.bench.pytorch.run import bench_peers, check_peers
from launch.bench.step import TimedStep
from launch.bench.timing import spread
from mpmc_jax.text import first_line

# No small step begins later than this, in seconds.
LIMIT = 300
_SMALL_STEPS = 2
_DTYPES = ("float32", "bfloat16")
_TOP = 10
_TORCH = "import torch; print(torch.__version__, torch.cuda.is_available())"

# Configuration of a method, with MPMC "off", "paper" or "recommended".
MakeConfig = Callable[[str, str], ml_collections.ConfigDict]


class _Report:
    """Figures of the parts that ran, and the errors of those that failed."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def run(self, name: str, part: Callable[..., Any], *args: Any) -> Any:
        """Runs a part; returns None where it fails."""
        print(f"{self.seconds:4.0f} s: {name}", file=sys.stderr)
        try:
            return part(*args)
        except Exception as error:  # whatever it is, the other parts go on
            reason = first_line(error)
            self.failed[name] = f"{type(error).__name__}: {reason}"
            return None


def bench_gpu(
    make: MakeConfig,
    methods: Iterable[str],
    repeats: int,
    peers: list[str],
    *,
    shrink: bool,
) -> dict[str, Any]:
    """Checks and times a GPU.

    Args:
      make: makes the configurations.
      methods: the methods that take small steps.
      repeats: timed steps of each program.
      peers: PyTorch's steps to time; if empty, in bfloat16 under autocast where PyTorch
        for GPUs is installed.
      shrink: runs on any device, with small networks and images: a rehearsal.

    Raises:
      ValueError: there is no GPU, and this is no rehearsal.
    """
    # PyTorch's process needs memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform != "gpu" and not shrink:
        raise ValueError(
            f"--what=gpu: JAX finds no GPU here, only {device.device_kind}; install "
            '"jax[cuda12]" (see docs/nvidia_gpus.md), or add --shrink to rehearse on '
            "this device"
        )
    report, torch = _Report(), installed_torch()
    if not peers and torch["cuda"]:
        peers = ["torch_amp"]
    steps = {}
    for mpmc in ("off", "recommended"):
        config = make("unimatch", mpmc)
        if shrink:
            _shrink(config)
        steps |= _time(report, f"UniMatch, MPMC {mpmc}", config, repeats, peers)
    small = _check_methods(report, make, methods)
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.client.platform_version,
            "bytes": (device.memory_stats() or {}).get("bytes_limit"),
        },
        "torch_installed": torch,
        "timed": steps,
        "small_steps": small,
        "failed": report.failed,
        "total_seconds": report.seconds,
    }


def _check_methods(
    report: _Report, make: MakeConfig, methods: Iterable[str]
) -> dict[str, Any]:
    """Takes small steps of every method in each dtype."""
    found = {}
    for method in methods:
        for dtype in _DTYPES:
            name = f"{method} in {dtype}"
            if report.seconds > LIMIT:
                report.failed[name] = f"not begun after {LIMIT} s"
                continue
            config = make(method, "recommended")
            config.model.backbone, config.model.dtype = "resnet18", dtype
            _shrink(config)
            found[name] = report.run(name, small_steps, config)
    return found


def _time(
    report: _Report,
    name: str,
    config: ml_collections.ConfigDict,
    repeats: int,
    peers: list[str],
) -> dict[str, Any]:
    """Times a step alone, and in turns with PyTorch's."""
    ours = report.run(f"{name}: compilation", TimedStep, config)
    if ours is None:
        return {}
    found = {name: report.run(name, timed, ours, repeats)}
    if peers:
        name = f"{name}, beside PyTorch"
        found[name] = report.run(name, _compare, config, repeats, peers, ours)
    return found


def installed_torch() -> dict[str, Any]:
    """Returns PyTorch's version, None if it is not installed, and if it sees a GPU.

    Another process is asked: CUDA libraries of both may not get along in one.
    """
    answer = subprocess.run(
        [sys.executable, "-c", _TORCH], capture_output=True, text=True
    )
    if answer.returncode:
        print("PyTorch is not installed: only our steps are timed", file=sys.stderr)
        return {"version": None, "cuda": False}
    version, cuda = answer.stdout.split()
    return {"version": version, "cuda": cuda == "True"}


def timed(ours: TimedStep, repeats: int) -> dict[str, Any]:
    """Times a step, also relative to its model, and lists what took the time."""
    first = ours.step()
    times = spread([ours.seconds() for _ in range(repeats)])
    # Of this process, programs that ran before included.
    memory = jax.devices()[0].memory_stats() or {}
    found = {
        **ours.figures,
        "loss": first,
        "step_seconds": times,
        "peak_bytes_in_use": memory.get("peak_bytes_in_use"),
        "modeled": modeled(ours.text),
    }
    if "seconds" in found["modeled"]:
        found["over_modeled"] = times[1] / found["modeled"]["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        found["operations"] = ours.profile(Path(folder))
    return found


def _compare(
    config: ml_collections.ConfigDict, repeats: int, peers: list[str], ours: TimedStep
) -> dict[str, Any]:
    check_peers(config, "step", peers)
    return bench_peers(config, repeats, peers, ours)


def modeled(text: str) -> dict[str, Any]:
    """Counts the kernels of a program that this device runs, at its rates.

    A device without known rates has no figures, only its name.
    """
    kind = jax.devices()[0].device_kind
    name = gpus.name_of(kind)
    if name is None:
        return {"unknown": kind}
    return roofline.figures(hlo.kernels(text), gpus.RATES[name], 1, _TOP)


def small_steps(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Takes a few steps.

    Raises:
      ValueError: a loss is not finite.
    """
    step = TimedStep(config)
    losses = [step.step() for _ in range(_SMALL_STEPS)]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"losses {losses} are not finite")
    return {"losses": losses, "compile_seconds": step.figures["compile_seconds"]}


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Leaves an eighth of the channels, crops of 65 pixels and a single group."""
    config.model.width = 8
    config.data.crop = 65
    config.train.batch_size = config.train.group_size
