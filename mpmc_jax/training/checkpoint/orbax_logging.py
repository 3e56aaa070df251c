"""Keeps what Orbax says to its developers from a run's users."""

import logging
import sys
from typing import Any


def silence_failures() -> None:
    """Of saves and restores, which are raised, and need no tracebacks besides.

    A failed save is logged with one first. A failed one of either kind leaves others
    under way, which then miss their loop and tell `sys.unraisablehook` so, at any later
    time; nothing is lost by it.
    """
    logging.getLogger("absl").addFilter(_without_traceback)
    previous = sys.unraisablehook
    if getattr(previous, "silences_failures", False):
        return

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    hook.silences_failures = True  # pyright: ignore
    sys.unraisablehook = hook


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
