"""Steps that were sent to the devices and whose metrics were not read yet."""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mpmc_jax.training.train_step import Metrics
from mpmc_jax.types import Batch


class _Step(NamedTuple):
    number: int
    read: Callable[[], Metrics]
    batch: Batch


class SkippedUpdateError(Exception):
    """A step's update was skipped.

    Attributes:
      step, batch: the step's number and its batch.
      metrics: the step's metrics.
    """

    def __init__(self, step: int, batch: Batch, metrics: Metrics) -> None:
        super().__init__()
        self.step, self.batch, self.metrics = step, batch, metrics


class Pending:
    """The steps that were sent and not read, oldest first."""

    def __init__(self) -> None:
        self._steps: collections.deque[_Step] = collections.deque()

    def add(self, number: int, read: Callable[[], Metrics], batch: Batch) -> None:
        """Adds a step that was sent; `read` waits for it and returns its metrics."""
        self._steps.append(_Step(number, read, batch))

    def read_oldest(self, left: int) -> Iterator[tuple[int, Metrics]]:
        """Yields (step, metrics) of all steps but the last `left`, as they are read.

        Raises:
          SkippedUpdateError: a step's update was skipped.
        """
        while len(self._steps) > left:
            oldest = self._steps.popleft()
            metrics = oldest.read()
            if metrics.skipped:
                raise SkippedUpdateError(oldest.number, oldest.batch, metrics)
            yield oldest.number, metrics
