"""Hides what Orbax prints about saves and restores and no user needs to read."""

import logging
import sys
from typing import Any


def silence_noise() -> None:
    """Hides Orbax's log tracebacks, its late errors and its remark on slow saves.

    Failed saves and restores raise; their log tracebacks are suppressed. A save that
    waits for the previous one costs a second or two, which no setting would save.
    """
    logging.getLogger("absl").addFilter(_is_wanted)
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


def _is_wanted(record: logging.LogRecord) -> bool:
    waited = str(record.msg).startswith("Waiting for previous save to complete")
    return record.exc_info is None and not waited
