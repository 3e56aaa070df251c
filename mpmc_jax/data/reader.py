"""From a place in an id list to crops of that image: what grain's threads run."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

from mpmc_jax.data import decode
from mpmc_jax.data.geometry import registry as host
from mpmc_jax.data.geometry.cropping import CropConfig, Picture, size_of, to_bytes
from mpmc_jax.data.masks import decode_mask
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

# By name; of `resident` some are trees of arrays.
Arrays = dict[str, Any]


class CropReader(Protocol):
    """What makes crops of one list's images."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Place in the list -> name."""
        ...

    def crops(
        self, place: int, rng: np.random.Generator, settings: Sequence[CropConfig]
    ) -> list[Arrays]:
        """As many crops of one image as there are settings, drawn in that order."""
        ...

    def nothing(self, size: int) -> Arrays:
        """A crop without a real pixel."""
        ...


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads images of one list and crops them.

    Attributes:
      records: of the training images.
      positions: place in the list -> record.
      ids: place in the list -> name, for messages.
      pixels: how they are stored.
      geometry: draws where a crop lies.
      with_label: whether the list's masks are read; images without are given in bytes
        even if they are stored deeper.
    """

    records: Sequence[dict]
    positions: np.ndarray
    ids: tuple[str, ...]
    pixels: PixelFormat
    geometry: host.Geometry
    with_label: bool

    def crops(
        self, place: int, rng: np.random.Generator, settings: Sequence[CropConfig]
    ) -> list[Arrays]:
        """As many crops of one image as there are settings, drawn in that order.

        Raises:
          ValueError: the image cannot be read; the text names its record.
        """
        record = self.records[int(self.positions[place])]
        try:
            picture = decode.open_picture(record["image"], self.pixels)
            label_hw = decode_mask(record["mask"]) if self.with_label else None
        except UnreadableImage as error:
            raise ValueError(f"record {self.ids[place]!r}: {error}") from error
        return [self._one(place, picture, label_hw, rng, each) for each in settings]

    def _one(
        self,
        place: int,
        picture: Picture,
        label_hw: np.ndarray | None,
        rng: np.random.Generator,
        crop: CropConfig,
    ) -> Arrays:
        cut = self.geometry(rng, size_of(picture), crop)
        image = cut.image(picture, crop, self.pixels)
        arrays = {"extent": cut.extent(), "index": np.array(place, np.int32)}
        if label_hw is None:
            return {**arrays, "image": to_bytes(image, self.pixels)}
        return {**arrays, "image": image, "label": cut.label(label_hw, crop)}

    def nothing(self, size: int) -> Arrays:
        """A crop without a real pixel."""
        return {
            "image": np.zeros((size, size, self.pixels.channels), self.pixels.dtype),
            "extent": np.zeros(4, np.int32),
            "index": np.array(0, np.int32),
            "label": np.full((size, size), IGNORE_LABEL, np.uint8),
        }


@dataclasses.dataclass(frozen=True)
class ReadLabeled(grain.transforms.RandomMap):
    """Place in the labeled list -> its crop, and half of the time one to copy from.

    The source's draws come first, as published.
    """

    reader: CropReader
    crop: CropConfig
    source_crop: CropConfig | None

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
    """Place in the unlabeled list -> crops of that image, by what they are for."""

    reader: CropReader
    crop: CropConfig
    names: tuple[str, ...]

    def random_map(self, element: int, rng: np.random.Generator) -> Any:
        crops = self.reader.crops(element, rng, [self.crop] * len(self.names))
        return dict(zip(self.names, crops, strict=True))
