"""Damaged checkpoints are moved away; what a failed save or restore was about."""

import json
import logging
import os
import re
from pathlib import Path

import jax

_LOG = logging.getLogger(__name__)


def metrics_file(step: Path) -> Path:
    """Where Orbax keeps the metrics of a step's folder."""
    return step / "metrics" / "metrics"


def set_aside(folder: Path, why: str) -> None:
    """Renames a step's folder to damaged-STEP, and says so."""
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    _LOG.warning("checkpoint %s: %s; moved to %s", folder, why, target.name)


def set_aside_unreadable(directory: Path) -> None:
    """A truncated metrics file would keep Orbax's manager from opening at all."""
    for step in directory.iterdir():
        metrics = metrics_file(step)
        if not (step.name.isdigit() and metrics.exists()):
            continue
        try:
            json.loads(metrics.read_text())
        except ValueError:
            set_aside(step, "its metrics are damaged")


def of_another_process(error: BaseException | None) -> BaseException | None:
    """What JAX raised below an error: no disk fails so, but a process that is gone."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error


def first_line(error: Exception) -> str:
    """An error in at most 100 characters."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 100 else f"{text[:100]} ..."


def reason(error: Exception) -> str:
    """Why a file could not be written, of the errors that TensorStore raises."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else first_line(error)
