"""A parallel map over the files of a data set: threads, in order, with progress."""

import collections
import concurrent.futures
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from mpmc_jax.text import bar_width

T = TypeVar("T")
R = TypeVar("R")

_TO_FILE_SECONDS = 30
_TO_FILE = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left\n"


def map_in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yields `function` of each item, in order, computed by threads.

    Threads are only a few items ahead, so that an interruption ends at once and memory
    is bounded.
    """
    items = iter(items)
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ahead = collections.deque(
            pool.submit(function, item) for item in itertools.islice(items, 2 * threads)
        )
        while ahead:
            yield ahead.popleft().result()
            for item in itertools.islice(items, 1):
                ahead.append(pool.submit(function, item))


def with_progress(results: Iterable[R], total: int, title: str) -> Iterator[R]:
    """Yields the results and reports count, speed and time left on stderr.

    On a terminal this is one line that is updated, elsewhere a line per half minute.
    """
    terminal = sys.stderr.isatty()
    seconds = 0.5 if terminal else _TO_FILE_SECONDS
    yield from tqdm(
        results,
        total=total,
        desc=title,
        unit=" images",
        leave=not terminal,
        mininterval=seconds,
        maxinterval=seconds,
        delay=0 if terminal else _TO_FILE_SECONDS,
        **bar_width(sys.stderr),
        bar_format=None if terminal else _TO_FILE,
    )


def map_with_progress(
    function: Callable[[T], R], items: Sequence[T], title: str
) -> Iterator[R]:
    """Yields `function` of each item, in order, and reports progress on stderr."""
    return with_progress(map_in_order(function, items), len(items), title)
