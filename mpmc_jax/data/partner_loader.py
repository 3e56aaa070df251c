"""Images that the method asks for during the run, read some steps ahead.

The device chooses, the loop passes the choice on, and a thread reads while the steps in
between run. What an image's crop is drawn from depends on the step and its row alone.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

Arrays = Mapping[str, Any]
Read = Callable[[int, np.random.Generator], Arrays]


class Requests:
    """Reads requested images in threads; `close` it when done.

    Args:
      read: (place in the unlabeled list, draws) -> arrays of one crop.
      rows: rows of a request that this process serves.
      seed: of the crops.
      threads: how many.
    """

    def __init__(self, read: Read, rows: np.ndarray, seed: int, threads: int) -> None:
        self._read, self._rows, self._seed = read, rows, seed
        self._pool = ThreadPoolExecutor(max(threads, 1))
        self._pending: dict[int, list[Future[Arrays]]] = {}

    def ask(self, step: int, images: np.ndarray) -> None:
        """Starts to read the partners of `step`, one a group of the global batch."""
        self._pending[step] = [
            self._pool.submit(self._one, step, int(row), int(images[row]))
            for row in self._rows
        ]

    def _one(self, step: int, row: int, image: int) -> Arrays:
        rng = np.random.default_rng((self._seed, 3, step, row))
        return self._read(image, rng)

    def take(self, step: int) -> dict[str, Any]:
        """Waits for what was asked for `step`, stacked.

        Raises:
          RuntimeError: nothing was; the loop and the method are out of order.
        """
        if step not in self._pending:
            raise RuntimeError(f"no image was requested for step {step}")
        crops = [future.result() for future in self._pending.pop(step)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *crops)

    def close(self) -> None:
        """Ends the threads; what was asked for is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)
