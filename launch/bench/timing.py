"""What the benches share: compile counts, an empty cache, a ceiling, a spread."""

import collections
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from mpmc_jax.experiments.step_program import peak_bytes

COMPILED = "/jax/core/compile/backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"


@contextmanager
def counted() -> Iterator[collections.Counter]:
    """Counts programs that are compiled, and those that the cache had, meanwhile."""
    counts = collections.Counter()

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        counts[event] += 1

    def on_event(event: str, **_: Any) -> None:
        counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)


@contextmanager
def empty_cache() -> Iterator[None]:
    """A compilation cache of its own, so that what is cold is cold."""
    before = jax.config.values["jax_compilation_cache_dir"]
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
            compilation_cache.reset_cache()


def matmul_ceiling(dtype: str) -> float:
    """FLOPs a second of one device on a large square product, the best of five."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)


def resident_bytes(process: int | str = "self") -> int:
    """Of a process, in memory now; 0 where /proc has none of that number."""
    status = pathlib.Path(f"/proc/{process}/statm")
    pages = status.read_text().split()[1] if status.exists() else 0
    return int(pages) * resource.getpagesize()


def program_figures(compiled: Any) -> dict[str, float]:
    """XLA's count of one device's FLOPs and bytes, and the memory it takes."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak_bytes(compiled),
    }


def spread(values: Sequence[float]) -> list[float]:
    """The smallest, the median and the largest."""
    return [min(values), statistics.median(values), max(values)]
