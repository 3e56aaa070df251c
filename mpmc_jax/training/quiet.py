"""Keeps what Orbax says to its developers from a run's users."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Orbax logs errors only."""
    orbax = logging.getLogger("absl")
    level = orbax.level
    orbax.setLevel(logging.ERROR)
    try:
        yield
    finally:
        orbax.setLevel(level)


def silence_abandoned_reads() -> None:
    """A failed restore leaves other reads under way, which then miss their loop.

    They tell `sys.unraisablehook` so, at any later time; nothing is lost by it.
    """
    previous = sys.unraisablehook
    if getattr(previous, "silences_abandoned_reads", False):
        return

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    hook.silences_abandoned_reads = True  # pyright: ignore
    sys.unraisablehook = hook
