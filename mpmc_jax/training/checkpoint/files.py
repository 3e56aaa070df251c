"""The files of checkpoints: reads them, checks them and sets damaged ones aside."""

import glob
import json
import logging
import math
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mpmc_jax import distributed
from mpmc_jax.text import first_line
from mpmc_jax.training.checkpoint import orbax_logging
from mpmc_jax.training.checkpoint.integrity import CheckpointError

_LOG = logging.getLogger(__name__)

SCORE = "score"

# Where Orbax moves a step before deleting it: readers find it whole, or not at all.
DELETED = "deleted"

_SEAL = "meta_checksum"
# Version 3 had no seal in part; kept so that it is refused by version, not as damaged.
_UNSEALED = 3


def steps(directory: Path) -> list[int]:
    """Lists the steps that are saved there, in order; not the one being saved."""
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def metrics_file(step: Path) -> Path:
    """Returns the file in a step's folder where Orbax keeps the metrics."""
    return step / "metrics" / "metrics"


def set_aside(folder: Path, why: str) -> None:
    """Renames a step's folder to damaged-STEP, and logs it."""
    target = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(target)
    _LOG.warning("checkpoint %s is damaged (%s); moved to %s", folder, why, target.name)


def score(step: Path) -> float | None:
    """Reads the score in a step's folder; None where a run just deleted the folder.

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
    """Removes the steps that a killed run was saving or deleting."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    remove_deleted(directory)


def remove_deleted(directory: Path) -> None:
    """Deletes the steps that are not kept, to free their disk space."""
    folder = directory / DELETED
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def check_path(directory: Path) -> None:
    """Refuses a path that Orbax would read as a pattern, and not find its own files.

    Raises:
      CheckpointError: the path has one of the characters * ? [.
    """
    if glob.has_magic(str(directory)):
        raise CheckpointError(
            f"{directory}: checkpoints cannot be read from a path with any of the "
            "characters * ? [; choose another --workdir"
        )


def check_writable(directory: Path) -> None:
    """Makes the directory if it does not exist, and checks that it can be written.

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
            "another --workdir or fix its permissions"
        ) from error


def read(folder: Path, **items: ocp.args.CheckpointArgs) -> Any:
    """Reads items of a step's folder in this process alone.

    If it raises, no other process waits for this one.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=None, active_processes={jax.process_index()}
    )
    handler = ocp.CompositeCheckpointHandler()
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        try:
            # Orbax reads no relative paths.
            return reader.restore(folder.absolute(), args=ocp.args.Composite(**items))
        except Exception:
            orbax_logging.hide_closed_loops()
            raise


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """Adds to a checkpoint's metadata their own checksum, for `read_meta`."""
    return {**meta, _SEAL: _checksum(meta)}


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the metadata of a step's folder.

    Raises:
      ValueError: they are not what was written.
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
    """Finds JAX's error that another process is gone below an error, or None."""
    if distributed.is_alone():
        return None
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error


def reason(error: Exception) -> str:
    """Extracts from TensorStore's errors why a file could not be written."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else first_line(error)
