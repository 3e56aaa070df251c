"""UniMatch's geometry for ACDC: whole slices, rotated and scaled to the crop's size.

Source: UniMatch, more-scenarios/medical/dataset/acdc.py and transform.py.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from mpmc_jax.data.decode import Decoded
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.pixels import PixelFormat

# Range of rotations in degrees, without the upper end.
_ANGLES = (-20, 20)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How a slice is rotated before it is scaled, by nearest neighbor throughout.

    Attributes:
      quarters: number of counter-clockwise quarter turns before mirroring, or None for
        a rotation by `degrees`.
      mirrored: the axis that is mirrored after quarter turns.
      degrees: angle of a rotation about the center; corners are filled with 0, in
        labels too.
      size: side of the crop.
    """

    quarters: int | None
    mirrored: int
    degrees: int
    size: int

    def extent(self) -> np.ndarray:
        """Returns the whole crop: all of its pixels count as real."""
        return np.array([0, 0, self.size, self.size], np.int32)

    def image(
        self, decoded: Decoded, config: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """Cuts the crop (size,size,c) out of an image."""
        del config
        values = np.asarray(decoded)
        return self.apply(values.reshape(*values.shape[:2], pixels.channels))

    def label(self, label_hw: np.ndarray, config: CropConfig) -> np.ndarray:
        """Cuts the crop (size,size) out of a label."""
        del config
        return self.apply(label_hw)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Converts (h,w) or (h,w,c) to (size,size) or (size,size,c), same type."""
        if self.quarters is not None:
            values = np.flip(np.rot90(values, self.quarters), self.mirrored)
        elif self.degrees:
            values = ndimage.rotate(values, self.degrees, order=0, reshape=False)
        rows, columns = values.shape[:2]
        factors = (self.size / rows, self.size / columns, 1)[: values.ndim]
        return np.asarray(ndimage.zoom(values, factors, order=0))


def draw_acdc(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Rotation:
    """Draws ACDC's rotation of a slice.

    Half of the slices get quarter turns and a mirroring, and half of the others a
    rotation by some degrees. Random numbers are drawn in this order: whether to do
    quarter turns, then their number and the mirrored axis; or else whether to rotate,
    then the angle. Only the crop's size is used of the settings.
    """
    del size
    if rng.random() < 0.5:
        quarters, axis = int(rng.integers(4)), int(rng.integers(2))
        return Rotation(quarters, axis, 0, config.size)
    degrees = int(rng.integers(*_ANGLES)) if rng.random() < 0.5 else 0
    return Rotation(None, 0, degrees, config.size)
