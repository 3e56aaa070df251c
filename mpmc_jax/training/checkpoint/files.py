"""The files of checkpoints: read, moved away where damaged, or not written, and why."""

import functools
import glob
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpmc_jax import distributed
from mpmc_jax.training.checkpoint.integrity import CheckpointError

_LOG = logging.getLogger(__name__)

SCORE = "score"

# Where Orbax moves a step that is not kept: readers meet it whole, or not at all.
DELETED = "deleted"

_SEAL = "meta_checksum"
# The format of which not all checkpoints have that seal.
_UNSEALED = 3


def steps(directory: Path) -> list[int]:
    """The steps that are saved there, in order; not the one being saved."""
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


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


def score(step: Path) -> float | None:
    """The score in a step's folder; None where a run just deleted the folder.

    Raises:
      CheckpointError: the file of the score is damaged or missing.
    """
    path = metrics_file(step)
    try:
        return _read_score(path)
    except (ValueError, OSError, RecursionError, OverflowError) as error:
        if not step.exists():
            return None
        raise CheckpointError(
            f"{path} is damaged ({first_line(error)}): use --checkpoint=last or "
            "--checkpoint=STEP; `launch.train` on this run sets the checkpoint aside"
        ) from error


def _read_score(path: Path) -> float:
    found = json.loads(path.read_bytes())
    number = found.get(SCORE) if isinstance(found, dict) else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError("it holds no score")
    if not math.isfinite(number):
        raise ValueError("its score is not finite")
    return number


def set_aside_unreadable(directory: Path) -> None:
    """Sets steps aside whose small files would keep Orbax's manager from opening."""
    names = ocp.path.step.standard_name_format()
    for step in filter(_is_step, list(directory.iterdir())):
        try:
            _read_score(metrics_file(step))
            _ = names.find_step(directory, int(step.name)).commit_timestamp_nsecs
        except Exception as error:  # any damage
            set_aside(step, f"its metrics or metadata: {first_line(error)}")


def remove_rest(directory: Path) -> None:
    """Removes what a killed run was saving or deleting."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    remove_deleted(directory)


def remove_deleted(directory: Path) -> None:
    """Frees the room of the steps that are not kept."""
    folder = directory / DELETED
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def check_path(directory: Path) -> None:
    """Refuses a path that Orbax takes for a pattern: it could not read its own files.

    Raises:
      CheckpointError: the path has one of the characters * ? [.
    """
    if glob.has_magic(str(directory)):
        raise CheckpointError(
            f"{directory}: checkpoints cannot be read from a path with any of the "
            "characters * ? [; choose another --workdir"
        )


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
        try:
            # Orbax reads no relative paths.
            return reader.restore(folder.absolute(), args=ocp.args.Composite(**items))
        except Exception:
            _hide_late_reads()
            raise


def _hide_late_reads() -> None:
    """Keeps TensorStore's threads from printing a traceback below the error.

    Orbax closes its event loop at the first array that cannot be read; the reads
    that still go on then tell a loop that is closed, and nobody waits for them.
    """
    hook = sys.unraisablehook
    if getattr(hook, "func", None) is not _except_late_reads:
        sys.unraisablehook = functools.partial(_except_late_reads, hook)


def _except_late_reads(
    hook: Callable[["sys.UnraisableHookArgs"], object],
    unraisable: "sys.UnraisableHookArgs",
) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        hook(unraisable)


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's metadata with its own checksum, for `read_meta`."""
    return {**meta, _SEAL: _checksum(meta)}


def read_meta(folder: Path) -> dict[str, Any]:
    """The metadata of a step's folder.

    Raises:
      ValueError: it is not what was written.
    """
    meta = read(folder, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict):
        raise ValueError("its metadata are no JSON object")
    seal = meta.pop(_SEAL, None)
    unsealed = seal is None and meta.get("format_version") == _UNSEALED
    if not unsealed and seal != _checksum(meta):
        raise ValueError("its metadata changed on disk")
    return meta


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def of_another_process(error: BaseException | None) -> BaseException | None:
    """What JAX raised below an error of several processes: one of them is gone."""
    if distributed.is_alone():
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
