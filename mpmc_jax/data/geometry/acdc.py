"""UniMatch's geometry for ACDC: whole slices, turned and brought to the crop's size.

Source: UniMatch, more-scenarios/medical/dataset/acdc.py and transform.py.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from mpmc_jax.data.decode import Picture
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.pixels import PixelFormat

# Degrees; the upper end excluded.
_ANGLES = (-20, 20)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What is done to a slice before it is zoomed, by nearest neighbor throughout.

    Attributes:
      quarters: quarter turns, counter-clockwise, followed by a mirroring, or None.
      mirrored: the axis of that.
      degrees: of a rotation about the center; what it uncovers is 0, in labels too.
      size: side of the crop.
    """

    quarters: int | None
    mirrored: int
    degrees: int
    size: int

    def extent(self) -> np.ndarray:
        """All of the crop counts as real."""
        return np.array([0, 0, self.size, self.size], np.int32)

    def image(
        self, picture: Picture, crop: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """See `cropping.Cut`."""
        del crop
        values = np.asarray(picture)
        return self.apply(values.reshape(*values.shape[:2], pixels.channels))

    def label(self, label_hw: np.ndarray, crop: CropConfig) -> np.ndarray:
        """See `cropping.Cut`."""
        del crop
        return self.apply(label_hw)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """(h,w) or (h,w,c) -> (size,size) or (size,size,c), of the same type."""
        if self.quarters is not None:
            values = np.flip(np.rot90(values, self.quarters), self.mirrored)
        elif self.degrees:
            values = ndimage.rotate(values, self.degrees, order=0, reshape=False)
        rows, columns = values.shape[:2]
        factors = (self.size / rows, self.size / columns, 1)[: values.ndim]
        return np.asarray(ndimage.zoom(values, factors, order=0))


def draw_acdc(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Turn:
    """Turns and mirrors half of the slices, rotates half of the others.

    Draws, in order: whether to turn, then turns and axis, or whether to rotate, and
    the angle. Of the settings only the crop's size matters.
    """
    del size
    if rng.random() < 0.5:
        quarters, axis = int(rng.integers(4)), int(rng.integers(2))
        return Turn(quarters, axis, 0, config.size)
    degrees = int(rng.integers(*_ANGLES)) if rng.random() < 0.5 else 0
    return Turn(None, 0, degrees, config.size)
