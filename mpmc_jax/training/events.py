"""A run's numbers as TensorBoard reads them."""

import contextlib
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import RecordWriter

# Seconds between two flushes, while numbers come.
_FLUSH_EVERY = 60


class Events:
    """Writes an event file.

    What cannot be written raises at once. tensorboardX's SummaryWriter writes from a
    thread that a full disk ends, and then waits for ever to hand it the next number.

    Args:
      directory: of the run's event files; each part of a run adds one.
      start: steps made already; TensorBoard forgets what was written of later ones.
    """

    def __init__(self, directory: Path, start: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._writer = RecordWriter(str(directory / name))
        self._flushed = time.monotonic()
        self._put(file_version="brain.Event:2")
        self._put(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step.

        Raises:
          OSError: they, or some before them, could not be written.
        """
        for name, value in values.items():
            # Not tensorboardX's `scalar`: it writes "_" for blanks and brackets, which
            # gives two classes one tag.
            one = Summary.Value(tag=name, simple_value=value)
            self._put(step=step, summary=Summary(value=[one]))
        if time.monotonic() - self._flushed > _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Puts all of it on disk.

        Raises:
          OSError: it could not be written.
        """
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file; what cannot be written any more was complained of before."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def _put(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
