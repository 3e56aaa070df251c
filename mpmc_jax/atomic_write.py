"""Result files that are written whole or not at all, and JSON that is always valid.

A file is written beside its place, flushed to the disk and renamed. A process that is
killed, or a disk that is full, leaves what was there before.
"""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file, or makes it; its folder exists.

    Raises:
      OSError: it could not be written; names the file, which is as it was before.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path`, or makes it, where no error is raised.

    Raises:
      OSError: it could not be written; names the file, which is as it was before.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with _open_alone(part) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a text file as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file as `write_bytes` does; see `to_json`."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Valid JSON, which has no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _open_alone(part: Path) -> Iterator[BinaryIO]:
    """Opens a file, empty, that no other process writes at the same time.

    What a killed process left is taken over. The system releases a lock whose process
    dies; a file system without locks leaves it at that.
    """
    while True:
        with open(part, "r+b", opener=_open_or_create) as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # The process before renamed or removed the file that was waited for.
            if not _is_there(part, file):
                continue
            file.truncate(0)
            yield file
            return


def _open_or_create(path: str, flags: int) -> int:
    """Opens a file in which a writer can go back, unlike in append mode."""
    return os.open(path, flags | os.O_CREAT, 0o666)


def _is_there(part: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(part.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def check_writable(folder: Path) -> None:
    """Makes sure that a result can be written, before it is computed.

    Raises:
      OSError: the folder is not there, or no file can be made in it.
    """
    with tempfile.TemporaryFile(dir=folder):
        pass
