"""Assembles volumes from slices, and sums counts over processes."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mpmc_jax.evaluation import batches
from mpmc_jax.evaluation.volumes import FIGURES, VolumeScores, score_volume


class Slices:
    """The predictions and labels of one process's volumes; every image is a slice."""

    def __init__(self, dataset: batches.Dataset):
        self._volumes = list(dataset.volumes)
        self._names = list(dict.fromkeys(self._volumes))
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def of_process(self, process: int, processes: int) -> list[int]:
        """The indices of the slices of every P-th volume, for P processes."""
        mine = set(self._names[process::processes])
        return [i for i, name in enumerate(self._volumes) if name in mine]

    def add(
        self, indices: Sequence[int], classes: np.ndarray, labels: np.ndarray
    ) -> None:
        """Stores the predicted classes and labels of a batch, (b,h,w) each."""
        for row, index in enumerate(indices):
            self._found[index] = classes[row], labels[row]

    def scores(self, num_classes: int) -> VolumeScores:
        """The metrics of all volumes, from all processes."""
        values = np.zeros((len(self._names), num_classes - 1, len(FIGURES)))
        for position, name in enumerate(self._names):
            members = [
                self._found[i]
                for i, volume in enumerate(self._volumes)
                if volume == name and i in self._found
            ]
            if members:
                prediction, truth = map(np.stack, zip(*members, strict=True))
                values[position] = score_volume(prediction, truth, num_classes)
        return VolumeScores(over_processes(values))


def over_processes(counts: np.ndarray) -> np.ndarray:
    """Sums an array of 64-bit numbers over all processes."""
    if jax.process_count() == 1:
        return counts
    # JAX would cast 64-bit numbers to 32 bits, so each is sent as two 32-bit halves.
    halves = multihost_utils.process_allgather(counts.view(np.int32))
    return np.asarray(halves).view(counts.dtype).sum(0)
