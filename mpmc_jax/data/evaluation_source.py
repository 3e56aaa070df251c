"""Whole images with their labels, for evaluation."""

import dataclasses
import io

import numpy as np
from PIL import Image

from mpmc_jax.data import source
from mpmc_jax.data.info import open_dataset


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """One image at its own size.

    Attributes:
      id: its name.
      image: (h,w,c) uint8.
      label: (h,w) uint8, 255 for void.
    """

    id: str
    image: np.ndarray
    label: np.ndarray


class EvalSource:
    """The labelled images of one split of a prepared data set, in order.

    Raises:
      FileNotFoundError: the data set was not prepared.
      ValueError: it has no such split, or no labelled image in it.
    """

    def __init__(self, data_dir: str, name: str, split: str):
        self.info = open_dataset(data_dir, name)
        if split not in self.info.ids:
            raise ValueError(f"unknown split {split!r}; one of {sorted(self.info.ids)}")
        self._positions = [
            i for i, key in enumerate(self.info.ids[split]) if key in self.info.present
        ]
        if not self._positions:
            raise ValueError(f"split {split!r} of {name!r} has no labelled image")
        self._records = self.info.records(split)
        self._sizes: dict[int, tuple[int, int]] = {}
        self.ids = tuple(self.info.ids[split][i] for i in self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def size(self, index: int) -> tuple[int, int]:
        """Rows and columns of an image, from its header alone; read once."""
        if index not in self._sizes:
            record = self._records[self._positions[index]]
            with Image.open(io.BytesIO(record["image"])) as image:
                self._sizes[index] = image.height, image.width
        return self._sizes[index]

    def __getitem__(self, index: int) -> EvalExample:
        """Decodes one image and its label.

        Raises:
          ValueError: the record cannot be decoded; the text names it.
        """
        record = self._records[self._positions[index]]
        try:
            image = source.decode_array(
                record["image"], self.info.facts.pixels.channels
            )
            label = source.decode_mask(record["mask"])
        except source.UnreadableImage as error:
            raise ValueError(f"record {self.ids[index]!r}: {error}") from error
        return EvalExample(self.ids[index], image, label)
