"""The files of checkpoints: read, moved away where damaged, or not written, and why."""

import json
import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpmc_jax.training import together
from mpmc_jax.training.integrity import CheckpointError

_LOG = logging.getLogger(__name__)

_SEAL = "meta_checksum"


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
    _LOG.warning("checkpoint %s is damaged (%s); moved to %s", folder, why, target.name)


def set_aside_unreadable(directory: Path) -> None:
    """A truncated metrics file would keep Orbax's manager from opening at all."""
    for step in directory.iterdir():
        metrics = metrics_file(step)
        if not (step.name.isdigit() and metrics.exists()):
            continue
        try:
            json.loads(metrics.read_text())
        except ValueError:
            set_aside(step, "its metrics are no JSON")


def check_writable(directory: Path) -> None:
    """Makes the directory if it is not there.

    Raises:
      CheckpointError: it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoints to {directory}: {error.strerror}; choose "
            "another --workdir or mend its permissions"
        ) from error


def read(folder: Path, **items: ocp.args.CheckpointArgs) -> Any:
    """Items of a step's folder; whatever it raises, other processes do not wait."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**items))


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata with its own checksum, for `read_meta`."""
    return {**meta, _SEAL: _checksum(meta)}


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a step's folder.

    Raises:
      ValueError: it is not what was written.
    """
    meta = read(folder, meta=ocp.args.JsonRestore())["meta"]
    # Checkpoints of format 3 had none at first.
    seal = meta.pop(_SEAL, None)
    if "format_version" not in meta or seal not in (None, _checksum(meta)):
        raise ValueError("its metadata changed on disk")
    return meta


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def of_another_process(error: BaseException | None) -> BaseException | None:
    """What JAX raised below an error of several processes: one of them is gone."""
    if together.is_alone():
        return None
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
