"""The step on noise, and MPMC's own operations beside it, for `launch.bench`."""

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from launch.bench import profiling
from launch.bench.timing import empty_cache, matmul_ceiling, program_figures, spread
from mpmc_jax.experiments.build import (
    build_parallel,
    init_state,
)
from mpmc_jax.experiments.step_program import noise_setup, random_batch
from mpmc_jax.training.train_step import StepInfo, make_step, make_step_info
from mpmc_jax.types import Array


def seconds(function: Callable[..., Any], repeats: int, *args: Array) -> list[float]:
    """Wall time of each call, after one that warms up."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return times


class TimedStep:
    """A step that is compiled and placed on its devices.

    Attributes:
      setup: the parts of the run.
      figures: FLOPs, bytes and compile time.
    """

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.setup = noise_setup(config)
        self._parallel = build_parallel(config)
        self._number = 0
        self._batch = self._parallel.place(random_batch(config, self.setup))
        self._state = self._parallel.replicate(init_state(self.setup, config.seed))
        begin = time.perf_counter()
        step: Any = self._parallel.compile(make_step(self.setup.step))
        lowered = step.lower(self._state, self._batch, self._step_info())
        traced = time.perf_counter()
        self._compiled = lowered.compile()
        compiled = time.perf_counter()
        self.figures = {
            **program_figures(self._compiled),
            "trace_seconds": traced - begin,
            "compile_seconds": compiled - traced,
        }

    @property
    def text(self) -> str:
        """The compiled program as text."""
        return self._compiled.as_text()

    def _step_info(self) -> StepInfo:
        return self._parallel.replicate(make_step_info(self._number))

    def step(self) -> float:
        """One update; the loss."""
        order = self._step_info()
        self._state, metrics = self._compiled(self._state, self._batch, order)
        self._number += 1
        return float(self._parallel.start_reading(metrics.values)()["loss"])

    def seconds(self) -> float:
        """Wall time of the next step."""
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin

    def profile(self, folder: pathlib.Path) -> list[dict[str, Any]]:
        """Traces the next step; its most expensive operations."""
        return profiling.trace(folder, self.step, self.text)


def bench_step(
    config: ml_collections.ConfigDict, repeats: int, profile: pathlib.Path | None = None
) -> dict[str, Any]:
    """images/s (labeled and unlabeled), FLOPs, bytes, memory and compile times.

    Compiles twice: into an empty cache, and from it. With a `profile` folder one more
    step leaves its trace there, and the ten most expensive operations are listed.
    """
    with empty_cache():
        cold = TimedStep(config).figures
        jax.clear_caches()
        timed = TimedStep(config)
    cached = timed.figures
    times = [timed.seconds() for _ in range(repeats + 1)][1:]
    seconds = statistics.median(times)
    train = config.train
    images = timed.setup.step.method.streams.images(train.batch_size, train.group_size)
    ceiling = matmul_ceiling(config.model.dtype)
    found = {
        "images_per_second": images / seconds,
        "step_seconds": seconds,
        "step_seconds_spread": spread(times),
        **cold,
        "cached_trace_seconds": cached["trace_seconds"],
        "cached_compile_seconds": cached["compile_seconds"],
        "matmul_flops_per_second": ceiling,
        # XLA counts the FLOPs of one device.
        "share_of_matmul": cold["flops"] / seconds / ceiling,
    }
    if profile:
        found["operations"] = timed.profile(profile)
    return found
