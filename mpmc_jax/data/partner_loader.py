"""Loads the partner images that a method requests during the run, some steps ahead.

AEL chooses partners on the device. The training loop passes the choice on, and threads
read the images while the steps in between run. The random numbers of a partner's crop
depend only on the seed, the step and its row in the batch.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

Arrays = Mapping[str, Any]
ReadCrop = Callable[[int, np.random.Generator], Arrays]


class PartnerLoader:
    """Reads requested images in threads; `close` it when done.

    Args:
      read_crop: (position in the unlabeled list, generator) -> arrays of one crop.
      rows: rows of the global batch that this process reads.
      seed: seed of the crops.
      threads: number of threads, at least one is used.
    """

    def __init__(
        self, read_crop: ReadCrop, rows: np.ndarray, seed: int, threads: int
    ) -> None:
        self._read_crop, self._rows, self._seed = read_crop, rows, seed
        self._pool = ThreadPoolExecutor(max(threads, 1))
        self._pending: dict[int, list[Future[Arrays]]] = {}

    def request(self, step: int, images: np.ndarray) -> None:
        """Starts reading the partners of `step`, one per group of the global batch."""
        self._pending[step] = [
            self._pool.submit(self._read, step, int(row), int(images[row]))
            for row in self._rows
        ]

    def _read(self, step: int, row: int, image: int) -> Arrays:
        rng = np.random.default_rng((self._seed, 3, step, row))
        return self._read_crop(image, rng)

    def take(self, step: int) -> dict[str, Any]:
        """Waits for the partners of `step` and returns their crops, stacked.

        Raises:
          RuntimeError: none were requested; loop and method disagree.
        """
        if step not in self._pending:
            raise RuntimeError(f"no image was requested for step {step}")
        crops = [future.result() for future in self._pending.pop(step)]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *crops)

    def close(self) -> None:
        """Stops the threads and drops all pending requests."""
        self._pool.shutdown(wait=True, cancel_futures=True)
