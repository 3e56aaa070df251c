"""Cuts crops out of images and labels, on the host.

A crop's `Placement` is drawn first and then applied to image and label alike. Only the
pixels of the crop are computed: Pillow's `resize(size, box=...)` gives the same as
resizing the whole image and cropping it, up to rounding by one gray level (labels agree
exactly). U2PL resizes by PyTorch, without antialias; its floats are rounded to bytes
here, in which crops are stored.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from mpmc_jax.data.decode import Decoded
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

# Byte values of the padding, from the mean of a data set's images in 0..1. AugSeg pads
# with ImageNet's mean, truncated; U2PL and AEL pad normalized images with zeros.
FILLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "black": np.zeros_like,
    "mean": lambda mean: np.floor(255 * mean),
    "rounded_mean": lambda mean: np.rint(255 * mean),
}


@dataclasses.dataclass(frozen=True)
class ClassFocus:
    """How often crops are centered on a pixel of some classes.

    Attributes:
      probability: share of the crops that are.
      classes: the classes; one that the image has is drawn for each crop.

    Raises:
      ValueError: the probability is not in [0, 1].
    """

    probability: float
    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"imbalance.crop_probability={self.probability}: must lie in [0, 1]"
            )


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """The size of crops and the range of the random resize.

    Attributes:
      size: side of the square crop in pixels.
      scale_min: the smallest factor of the random resize.
      scale_max: the largest factor.
      scale_base: the long side that factors refer to; 0 for the image's own.
      flip: whether half of the crops are mirrored horizontally.
      fill: color of the padding, a key of `FILLS`.
      focus: how often labeled crops are centered on chosen classes; None for never.
    """

    size: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    scale_base: int = 0
    flip: bool = True
    fill: str = "black"
    focus: ClassFocus | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"data.crop must be positive, not {self.size}")
        if not 0 < self.scale_min <= self.scale_max:
            raise ValueError(
                f"data.scale_min={self.scale_min} and data.scale_max={self.scale_max}: "
                "need 0 < scale_min <= scale_max"
            )
        if self.fill not in FILLS:
            raise ValueError(f"unknown fill {self.fill!r}; one of {sorted(FILLS)}")


class Cut(Protocol):
    """The drawn position of a crop in an image, by which image and label are cut."""

    def extent(self) -> np.ndarray:
        """Returns (4,) int32: top, left, bottom, right of the crop's real pixels."""
        ...

    def image(
        self, decoded: Decoded, config: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """Cuts the crop (size,size,c) out of an image; the type stays."""
        ...

    def label(self, label_hw: np.ndarray, config: CropConfig) -> np.ndarray:
        """Cuts the crop (size,size) out of a label, by nearest neighbor."""
        ...


@dataclasses.dataclass(frozen=True)
class Placement:
    """A `Cut` that resizes an image, takes a window of it, mirrors and pads it.

    Attributes:
      resized: rows and columns of the whole image after resizing.
      window: (top, left, bottom, right) of the crop in the resized image.
      flip: whether the window is mirrored.
      column, row: where the window begins in the crop; padding surrounds it.
      antialias: whether to resize images and labels like Pillow; else like PyTorch's
        interpolate, which also picks other labels.
      label_fill: label of the padding.
    """

    resized: tuple[int, int]
    window: tuple[int, int, int, int]
    flip: bool
    column: int
    row: int = 0
    antialias: bool = True
    label_fill: int = IGNORE_LABEL

    def extent(self) -> np.ndarray:
        """Returns (4,) int32: top, left, bottom, right of the crop's real pixels."""
        top, left, bottom, right = self.window
        height, width = bottom - top, right - left
        return np.array(
            [self.row, self.column, self.row + height, self.column + width], np.int32
        )

    def image(
        self, decoded: Decoded, config: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """Cuts the crop (size,size,c) out of an image, by bilinear interpolation."""
        resample = _resize_window if self.antialias else _interpolate_window
        window = resample(decoded, self)
        if window.ndim == 2:
            window = window[..., None]
        canvas = np.empty((config.size, config.size, pixels.channels), window.dtype)
        canvas[:] = fill_color(config.fill, pixels)
        return self._on_canvas(window, canvas)

    def label(self, label_hw: np.ndarray, config: CropConfig) -> np.ndarray:
        """Cuts the crop (size,size) out of a label and pads it with `label_fill`.

        Pixels are gathered by index. Pillow's `box` is in single precision, and would
        at ties give another pixel than resizing the whole label.
        """
        top, left, bottom, right = self.window
        pick = nearest if self.antialias else floored
        rows = pick(label_hw.shape[0], self.resized[0])[top:bottom]
        columns = pick(label_hw.shape[1], self.resized[1])[left:right]
        canvas = np.full((config.size, config.size), self.label_fill, np.uint8)
        return self._on_canvas(label_hw[rows[:, None], columns[None, :]], canvas)

    def centered(self, pixel: tuple[int, int], size: tuple[int, int]) -> "Placement":
        """Moves the window so that a pixel is in its middle, as far as the image goes.

        Args:
          pixel: row and column in the image as stored.
          size: rows and columns of that image.
        """
        top, left, bottom, right = self.window
        height, width = bottom - top, right - left
        corner = []
        for at, length, resized, side in zip(
            pixel, size, self.resized, (height, width), strict=True
        ):
            middle = (at + 0.5) * resized / length
            corner.append(min(max(int(middle - side / 2), 0), resized - side))
        top, left = corner
        window = (top, left, top + height, left + width)
        return dataclasses.replace(self, window=window)

    def _on_canvas(self, window: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        top, left, bottom, right = self.extent()
        canvas[top:bottom, left:right] = window[:, ::-1] if self.flip else window
        return canvas


def size_of(decoded: Decoded) -> tuple[int, int]:
    """Returns rows and columns of a decoded image."""
    if isinstance(decoded, Image.Image):
        return decoded.height, decoded.width
    rows, columns, _ = decoded.shape
    return rows, columns


def fill_color(name: str, pixels: PixelFormat) -> np.ndarray:
    """Returns the stored value (c,) of the padding `name` in every channel."""
    return pixels.stored(FILLS[name](np.array(pixels.mean)) / 255)


def to_bytes(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Scales stored values to bytes, truncated; bytes stay as they are.

    Source: UniMatch, more-scenarios/medical/dataset/acdc.py, its unlabeled slices.
    """
    if array.dtype == np.uint8:
        return array
    low, high = (np.array(v, np.float32) for v in (pixels.low, pixels.high))
    unit = (array.astype(np.float32) - low) / (high - low)
    return np.clip(unit * np.float32(255), 0, 255).astype(np.uint8)


def interpolation_neighbors(
    length: int, resized: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pixels that PyTorch's interpolate combines, along one axis.

    Args:
      length: pixels of the image.
      resized: pixels of the resized image.
      start, stop: the range of pixels of the resized image.

    Returns:
      For each of them the two source pixels and the weight of the second.
    """
    position = (np.arange(start, stop) + 0.5) * length / resized - 0.5
    position = np.maximum(position, 0).astype(np.float32)
    first = position.astype(int)
    return first, np.minimum(first + 1, length - 1), position - first


def window_box(
    placement: Placement, size: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the rows, and the columns, of the window in an image of `size`."""
    top, left, bottom, right = placement.window
    row_scale = size[0] / placement.resized[0]
    column_scale = size[1] / placement.resized[1]
    # Rounding must not move the box beyond the border.
    return (
        (top * row_scale, min(bottom * row_scale, size[0])),
        (left * column_scale, min(right * column_scale, size[1])),
    )


def _interpolate_window(decoded: Decoded, placement: Placement) -> np.ndarray:
    """Interpolates two pixels per axis, without antialias, as PyTorch does."""
    top, left, bottom, right = placement.window
    pixels = np.asarray(decoded)
    dtype = pixels.dtype
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    width, resized = pixels.shape[1], placement.resized[1]
    first_column, second_column, column_weight = interpolation_neighbors(
        width, resized, left, right
    )
    # Columns that the window does not need are left out first, to save time.
    begin = first_column[0]
    pixels = pixels[:, begin : second_column[-1] + 1]
    first_row, second_row, row_weight = interpolation_neighbors(
        len(pixels), placement.resized[0], top, bottom
    )
    row_weight, column_weight = row_weight[:, None, None], column_weight[None, :, None]
    lines = pixels[first_row] * (1 - row_weight) + pixels[second_row] * row_weight
    window = lines[:, first_column - begin] * (1 - column_weight)
    window += lines[:, second_column - begin] * column_weight
    return _as_type(window, dtype)


def _resize_window(decoded: Decoded, placement: Placement) -> np.ndarray:
    if isinstance(decoded, np.ndarray):
        # Pillow resizes one channel of floats at a time.
        planes = [
            _resize_window(Image.fromarray(plane.astype(np.float32)), placement)
            for plane in np.moveaxis(decoded, -1, 0)
        ]
        return _as_type(np.stack(planes, axis=-1), decoded.dtype)
    top, left, bottom, right = placement.window
    (low_row, high_row), (low_column, high_column) = window_box(
        placement, size_of(decoded)
    )
    box = (low_column, low_row, high_column, high_row)
    size = (right - left, bottom - top)
    return np.asarray(decoded.resize(size, Image.Resampling.BILINEAR, box=box))


def _as_type(window: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "f":
        window = np.floor(window + 0.5)
    return window.astype(dtype)


def nearest(length: int, resized: int) -> np.ndarray:
    """Returns the source index (resized,) of each pixel, as Pillow computes it.

    Pillow sums up the step, and at ties the rounding of this sum decides. It is summed
    here too, because the published crops were made that way.
    """
    steps = np.full(resized, length / resized)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(int)


def floored(length: int, resized: int) -> np.ndarray:
    """Returns the source index (resized,) of each pixel, as PyTorch computes it."""
    return np.arange(resized) * length // resized
