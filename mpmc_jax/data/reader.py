"""From a place in an id list to crops of that image: what grain's threads run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from mpmc_jax.data import host, source
from mpmc_jax.types import IGNORE_LABEL

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads images of one list and crops them.

    Attributes:
      records: of the training images.
      positions: place in the list -> record.
      ids: place in the list -> name, for messages.
      channels: of the images.
      geometry: draws where a crop lies.
      with_label: whether the list's masks are read.
    """

    records: Sequence[dict]
    positions: np.ndarray
    ids: tuple[str, ...]
    channels: int
    geometry: host.Geometry
    with_label: bool

    def crops(
        self, place: int, rng: np.random.Generator, settings: Sequence[host.CropConfig]
    ) -> list[Arrays]:
        """As many crops of one image as there are settings, drawn in that order.

        Raises:
          ValueError: the image cannot be read; the text names its record.
        """
        record = self.records[int(self.positions[place])]
        try:
            image = source.decode_image(record["image"], self.channels)
            label_hw = source.decode_mask(record["mask"]) if self.with_label else None
        except source.UnreadableImage as error:
            raise ValueError(f"record {self.ids[place]!r}: {error}") from error
        return [self._one(place, image, label_hw, rng, each) for each in settings]

    def _one(
        self,
        place: int,
        image: Image.Image,
        label_hw: np.ndarray | None,
        rng: np.random.Generator,
        crop: host.CropConfig,
    ) -> Arrays:
        placement = self.geometry(rng, (image.height, image.width), crop)
        arrays = {
            "image": host.crop_image(image, placement, crop),
            "extent": placement.extent(),
            "index": np.array(place, np.int32),
        }
        if label_hw is not None:
            arrays["label"] = host.crop_label(label_hw, placement, crop)
        return arrays

    def nothing(self, size: int) -> Arrays:
        """A crop without a real pixel."""
        return {
            "image": np.zeros((size, size, self.channels), np.uint8),
            "extent": np.zeros(4, np.int32),
            "index": np.array(0, np.int32),
            "label": np.full((size, size), IGNORE_LABEL, np.uint8),
        }


@dataclasses.dataclass(frozen=True)
class ReadLabeled(grain.transforms.RandomMap):
    """Place in the labelled list -> its crop, and half of the time one to copy from.

    The source's draws come first, as published.
    """

    reader: Reader
    crop: host.CropConfig
    source_crop: host.CropConfig | None

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        found = {}
        if self.source_crop is not None:
            found["source"] = self.reader.nothing(self.crop.size)
            if rng.random() < 0.5:
                other = int(rng.integers(len(self.reader.ids)))
                (found["source"],) = self.reader.crops(other, rng, [self.source_crop])
        (found["labeled"],) = self.reader.crops(element, rng, [self.crop])
        return found


@dataclasses.dataclass(frozen=True)
class ReadUnlabeled(grain.transforms.RandomMap):
    """Place in the unlabelled list -> one crop, or two of the same image."""

    reader: Reader
    crop: host.CropConfig
    partner: bool

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        names = ["unlabeled", "partner"] if self.partner else ["unlabeled"]
        crops = self.reader.crops(element, rng, [self.crop] * len(names))
        return dict(zip(names, crops, strict=True))
