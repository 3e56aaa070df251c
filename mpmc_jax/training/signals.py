"""Signals that ask a run to stop, and the loop that looks between two steps."""

import logging
import signal
from types import FrameType
from typing import Any

_LOG = logging.getLogger(__name__)


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop sees between steps.

    The second one acts at once: a compilation or an evaluation may take long.
    """

    def __init__(self) -> None:
        self.requested = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = signal.Signals(number).name
        _LOG.warning(
            "%s: stopping after this step; once more to end now", self.requested
        )
        signal.signal(number, self._previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
