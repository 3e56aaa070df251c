"""Signals that ask a run to stop; the loop looks for such a request between steps."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_LOG = logging.getLogger(__name__)

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class BlockInterrupted(Exception):
    """A signal came inside an interruptible block."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop sees between steps.

    A second signal, of either kind, ends the process at once. The first one acts at
    once inside an `interruptible` block, because an evaluation may take long. Unless
    `has_progress` is set there is nothing to save, and the first signal ends the
    process with status 128 plus its number. Python's handlers wait for the compilation
    of a step, which takes minutes on a CPU; a thread that reads what the C handler
    writes does not.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.has_progress = False
        self._interruptible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _NUMBERS:
            self._previous[number] = signal.signal(number, self._handle)
        self._incoming, self._outgoing = socket.socketpair()
        self._outgoing.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._outgoing.fileno())
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        came = 0
        while received := self._incoming.recv(1):
            if received[0] not in _NUMBERS:
                continue
            came += 1
            if came == 1 and self.has_progress:
                continue  # the loop sees it
            why = "while the step compiles: nothing to save yet"
            if came > 1:
                why = "again: ended at once; what the newest checkpoint holds is kept"
            name = signal.Signals(received[0]).name
            print(f"{name} {why}", file=sys.stderr, flush=True)
            os._exit(128 + received[0])
        self._incoming.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = self.requested or signal.Signals(number).name
        if self._interruptible:
            raise BlockInterrupted
        if self.has_progress:
            _LOG.warning(
                "%s: stopping after this step; send it again to quit now",
                self.requested,
            )

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a request to stop ends at once.

        Raises:
          BlockInterrupted: a stop was requested before or inside the block.
        """
        self._interruptible = True
        try:
            if self.requested:
                raise BlockInterrupted
            yield
        finally:
            self._interruptible = False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        # The thread reads the end of the stream and ends.
        self._outgoing.close()
