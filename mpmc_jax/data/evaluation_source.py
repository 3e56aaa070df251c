"""Whole images with their labels, for evaluation."""

import dataclasses

import numpy as np

from mpmc_jax.data import decode
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.masks import decode_mask
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.splits import check_labels


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One image at its own size.

    Attributes:
      id: its name.
      image: (h,w,c) as the data set stores it.
      label: (h,w) uint8, 255 for void.
    """

    id: str
    image: np.ndarray
    label: np.ndarray


class EvalSource:
    """The labeled images of one split of a prepared data set, in order.

    Attributes:
      ids: their names.
      volumes: the volume that each is a slice of, "" for none; slices of a volume are
        neighbors, in order.

    Raises:
      ValueError: the data set has no such split, or no labeled pixel in it.
    """

    def __init__(self, info: DatasetInfo, split: str):
        self.info = info
        if split not in self.info.ids:
            raise ValueError(
                f"{info.facts.dataset!r} in {info.directory} was prepared without a "
                f"split {split!r}; it has {sorted(self.info.ids)}"
            )
        self._positions = [
            i for i, key in enumerate(self.info.ids[split]) if key in self.info.present
        ]
        problems = check_labels(
            info.facts.dataset, {split: info.ids[split]}, info.present
        )
        if problems:
            raise ValueError(problems[0])
        self._records = self.info.records(split)
        self._sizes: dict[int, tuple[int, int]] = {}
        self.ids = tuple(self.info.ids[split][i] for i in self._positions)
        self.volumes = tuple(self.info.volumes.get(key, "") for key in self.ids)

    def __len__(self) -> int:
        return len(self._positions)

    def size(self, index: int) -> tuple[int, int]:
        """Rows and columns of an image, from its header alone; read once."""
        if index not in self._sizes:
            record = self._records[self._positions[index]]
            self._sizes[index] = decode.read_header(record["image"]).size
        return self._sizes[index]

    def __getitem__(self, index: int) -> EvalExample:
        """Decodes one image and its label.

        Raises:
          ValueError: the record cannot be decoded; the text names it.
        """
        record = self._records[self._positions[index]]
        try:
            image = decode.decode_array(record["image"], self.info.facts.pixels)
            label = decode_mask(record["mask"])
        except UnreadableImage as error:
            raise ValueError(f"record {self.ids[index]!r}: {error}") from error
        return EvalExample(self.ids[index], image, label)
