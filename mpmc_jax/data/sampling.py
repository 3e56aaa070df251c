"""Which image stands where in a run, for each stream, before it is read.

The labeled list is shorter than the unlabeled one, and published methods fill an
epoch with it in three ways:

    tiled       repeated to the unlabeled list's length and cut (UniMatch)
    drawn       as many drawn from the repeated list, once a run, as are unlabeled
                (AugSeg, U2PL)
    restarted   permutation after permutation, begun anew each epoch (AEL)

The first two are then shuffled anew each epoch, both streams alike: a labeled image
stays paired with its unlabeled ones. Partners that are other images are shuffled by
themselves (UniMatch on ACDC). When tiled, a labeled list that is longer than
the unlabeled one is not cut: another part of it is used each epoch.

An epoch has as many steps as the published loaders make of the unlabeled list: each
process takes every W-th image, the list filled up from its beginning, in whole batches.
The loaders of a supervised baseline do the same with the labeled list alone
(`unlabeled` 0): no image comes twice but to fill the list up.
"""

import dataclasses
import functools
import sys
from typing import Any

import grain
import numpy as np

# 2 and 3 seed the restarted order and the requests.
_STREAM_NUMBERS = {"labeled": 0, "unlabeled": 1, "partner": 4}


@dataclasses.dataclass(frozen=True)
class Order:
    """The places of one stream.

    Attributes:
      kind: of the labeled stream, see above.
      labeled, unlabeled: lengths of the two lists; `unlabeled` is 0 where an epoch is
        over the labeled list.
      batch_size: labeled images a step.
      groups: W, the processes that they were on as published.
      per_step: images of this stream a step.
      seed: of the run.
    """

    kind: str
    labeled: int
    unlabeled: int
    batch_size: int
    groups: int
    per_step: int
    seed: int

    @property
    def epoch(self) -> int:
        """Images of an epoch before the last batch is cut."""
        return self.unlabeled or self.labeled

    @property
    def steps_per_epoch(self) -> int:
        """Of the published loaders, at least 1."""
        of_process = -(-self.epoch // self.groups)
        return max(of_process // (self.batch_size // self.groups), 1)

    @property
    def unused(self) -> int:
        """Labeled images that no epoch uses, as published loaders cut the list."""
        if self.kind == "drawn":
            return max(self.labeled - self.epoch, 0)
        if self.kind == "restarted":
            # Only a permutation that ends gives way to another.
            return max(self.labeled - self.steps_per_epoch * self.batch_size, 0)
        return 0

    def stream_seed(self, name: str) -> int:
        """Seed of everything random about a stream."""
        entropy = np.random.SeedSequence((self.seed, _STREAM_NUMBERS[name]))
        return int(entropy.generate_state(1)[0])

    def build(self, name: str) -> grain.MapDataset:
        """Endless places in the list of a stream, "partner" in the unlabeled one."""
        if name == "labeled" and self.kind == "restarted":
            restarted = _Restarted(
                self.labeled, self.per_step, self.steps_per_epoch, self.seed
            )
            return grain.MapDataset.source(restarted).seed(self.stream_seed(name))
        if self.kind == "drawn":
            places = self._drawn(name)
        else:
            places = self._tiled() if name == "labeled" else range(self.unlabeled)
        dataset = grain.MapDataset.source(list(places)).seed(self.stream_seed(name))
        together = "partner" if name == "partner" else "unlabeled"
        dataset = dataset.shuffle(seed=self.stream_seed(together))
        whole = self.steps_per_epoch * self.per_step
        if whole <= len(places):
            return dataset[:whole].repeat(None)
        filled = grain.MapDataset.source(_Filled(dataset, len(places), whole))
        return filled.seed(self.stream_seed(name))

    def _tiled(self) -> list[int]:
        tiles = -(-self.epoch // self.labeled)
        tiled = np.tile(np.arange(self.labeled), tiles)
        return tiled[: max(self.epoch, self.labeled)].tolist()

    def _drawn(self, name: str) -> list[int]:
        rng = np.random.default_rng(self.stream_seed(name))
        length = getattr(self, name)
        tiled = np.tile(np.arange(length), -(-self.epoch // length))
        return rng.permutation(tiled)[: self.epoch].tolist()


class _Filled:
    """Endless epochs of `whole` places, each filled up from its beginning."""

    def __init__(self, shuffled: grain.MapDataset, length: int, whole: int):
        self._places = shuffled.repeat(None)
        self._length, self._whole = length, whole

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, within = divmod(int(index), self._whole)
        place: Any = self._places[epoch * self._length + within % self._length]
        return place


class _Restarted:
    """Place i of the run -> place in the labeled list, as AEL's loader serves it.

    A loader is begun anew each epoch. Whenever it ends within one, the next
    permutation takes over; the new epoch begins with the one that was interrupted. The
    last batch of a permutation is filled up from its beginning.
    """

    def __init__(self, length: int, batch: int, steps_per_epoch: int, seed: int):
        self._length, self._batch = length, batch
        self._steps_per_epoch = steps_per_epoch
        self._batches = -(-length // batch)
        self._exhausted = (steps_per_epoch - 1) // self._batches
        # Grain makes one iterator a thread: each keeps the permutation it is in.
        self._permutation = functools.lru_cache(maxsize=4)(
            lambda number: np.random.default_rng((seed, 2, number)).permutation(length)
        )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        step, row = divmod(int(index), self._batch)
        epoch, within = divmod(step, self._steps_per_epoch)
        ended, batch = divmod(within, self._batches)
        permutation = self._permutation(epoch * self._exhausted + ended)
        return int(permutation[(batch * self._batch + row) % self._length])
