"""Hides what Orbax prints about failed saves and restores besides raising an error."""

import logging
import sys
from typing import Any


def silence_failures() -> None:
    """Hides Orbax's log tracebacks and its late errors.

    Failed saves and restores raise; their log tracebacks are suppressed.
    """
    logging.getLogger("absl").addFilter(_without_traceback)
    hide_closed_loops()


def hide_closed_loops() -> None:
    """Hides the error "Event loop is closed" of operations that nobody waits for.

    Orbax closes its event loop at the first array that cannot be read or written. The
    operations on other arrays still run in threads, find the loop closed at some later
    time, and Python reports that to `sys.unraisablehook`. Nothing is lost by it.
    """
    previous = sys.unraisablehook
    if getattr(previous, "hides_closed_loops", False):
        return

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    hook.hides_closed_loops = True  # pyright: ignore
    sys.unraisablehook = hook


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
