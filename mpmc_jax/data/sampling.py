"""The sampling order: which image is at which position of a run, for each stream.

The labeled list is shorter than the unlabeled one, and published methods fill an epoch
with it in three ways:

    tiled       repeated to the length of the unlabeled list and cut there (UniMatch)
    drawn       sampled once per run from the repeated list, as many as there are
                unlabeled images (AugSeg, U2PL)
    restarted   permutation after permutation, restarted in each epoch (AEL)

The first two are then shuffled anew in each epoch, with the same permutation for both
streams, so that a labeled image meets the same unlabeled images in every epoch.
Partners that are other images have their own shuffle (UniMatch on ACDC). A tiled
labeled list that is longer than the unlabeled one is not cut: each epoch uses another
part of it.

An epoch has as many steps as the published data loaders make of the unlabeled list:
each of W processes takes every W-th image, after the list is padded from its beginning,
and drops the last incomplete batch. The loaders of a supervised baseline do the same
with the labeled list alone (`unlabeled` 0); an image then occurs twice only as padding.
"""

import dataclasses
import functools
import sys
from typing import Any

import grain
import numpy as np

# Part of each stream's seed; 2 and 3 are taken by `_Restarted` and `PartnerLoader`.
_STREAM_NUMBERS = {"labeled": 0, "unlabeled": 1, "partner": 4}


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The order in which one stream visits the images of its list.

    Attributes:
      kind: how the labeled list fills an epoch: "tiled", "drawn" or "restarted".
      labeled, unlabeled: lengths of the two lists; `unlabeled` is 0 if an epoch passes
        over the labeled list.
      batch_size: labeled images per step.
      published_processes: W, the number of processes of the published run.
      per_step: images of this stream per step.
      seed: seed of the run.
    """

    kind: str
    labeled: int
    unlabeled: int
    batch_size: int
    published_processes: int
    per_step: int
    seed: int

    @property
    def images_per_epoch(self) -> int:
        """Number of images per epoch before the last batch is dropped."""
        return self.unlabeled or self.labeled

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch of the published data loaders, at least 1."""
        of_process = -(-self.images_per_epoch // self.published_processes)
        return max(of_process // (self.batch_size // self.published_processes), 1)

    @property
    def unused(self) -> int:
        """Number of labeled images that no epoch uses, as in the published loaders."""
        if self.kind == "drawn":
            return max(self.labeled - self.images_per_epoch, 0)
        if self.kind == "restarted":
            # Each epoch begins with the permutation that the last one interrupted, so
            # the rest of a permutation longer than an epoch is never reached.
            return max(self.labeled - self.steps_per_epoch * self.batch_size, 0)
        return 0

    def stream_seed(self, name: str) -> int:
        """Returns the seed of all random numbers of a stream."""
        entropy = np.random.SeedSequence((self.seed, _STREAM_NUMBERS[name]))
        return int(entropy.generate_state(1)[0])

    def build(self, name: str) -> grain.MapDataset:
        """Returns the endless positions of a stream in its list.

        The list of "partner" is the unlabeled one.
        """
        if name == "labeled" and self.kind == "restarted":
            restarted = _Restarted(
                self.labeled, self.per_step, self.steps_per_epoch, self.seed
            )
            return grain.MapDataset.source(restarted).seed(self.stream_seed(name))
        if self.kind == "drawn":
            positions = self._drawn(name)
        else:
            positions = self._tiled() if name == "labeled" else range(self.unlabeled)
        dataset = grain.MapDataset.source(list(positions)).seed(self.stream_seed(name))
        shuffled_with = "partner" if name == "partner" else "unlabeled"
        dataset = dataset.shuffle(seed=self.stream_seed(shuffled_with))
        per_epoch = self.steps_per_epoch * self.per_step
        if per_epoch <= len(positions):
            return dataset[:per_epoch].repeat(None)
        padded = grain.MapDataset.source(_Padded(dataset, len(positions), per_epoch))
        return padded.seed(self.stream_seed(name))

    def _tiled(self) -> list[int]:
        tiles = -(-self.images_per_epoch // self.labeled)
        tiled = np.tile(np.arange(self.labeled), tiles)
        return tiled[: max(self.images_per_epoch, self.labeled)].tolist()

    def _drawn(self, name: str) -> list[int]:
        rng = np.random.default_rng(self.stream_seed(name))
        length = getattr(self, name)
        tiled = np.tile(np.arange(length), -(-self.images_per_epoch // length))
        return rng.permutation(tiled)[: self.images_per_epoch].tolist()


class _Padded:
    """Endless epochs of `per_epoch` positions, each padded from its own beginning."""

    def __init__(self, shuffled: grain.MapDataset, length: int, per_epoch: int):
        self._positions = shuffled.repeat(None)
        self._length, self._per_epoch = length, per_epoch

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, within = divmod(int(index), self._per_epoch)
        position: Any = self._positions[epoch * self._length + within % self._length]
        return position


class _Restarted:
    """The labeled list in the order in which AEL's data loader returns it.

    The loader is restarted in each epoch. When a permutation is used up within an
    epoch, the next one follows; a new epoch restarts the one that was interrupted. The
    last batch of a permutation is padded from the permutation's beginning.
    """

    def __init__(self, length: int, batch: int, steps_per_epoch: int, seed: int):
        self._length, self._batch = length, batch
        self._steps_per_epoch = steps_per_epoch
        self._batches = -(-length // batch)
        # A permutation that ends with its epoch counts as interrupted.
        self._used_up_per_epoch = (steps_per_epoch - 1) // self._batches
        # Several of grain's threads read at once, each within its own permutation.
        self._permutation = functools.lru_cache(maxsize=4)(
            lambda number: np.random.default_rng((seed, 2, number)).permutation(length)
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        step, row = divmod(int(index), self._batch)
        epoch, within = divmod(step, self._steps_per_epoch)
        ended, batch = divmod(within, self._batches)
        permutation = self._permutation(epoch * self._used_up_per_epoch + ended)
        return int(permutation[(batch * self._batch + row) % self._length])
