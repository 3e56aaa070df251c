"""Cutting crops out of images and labels, on the host.

A crop's `Placement` is drawn first and then applied, so that image and label move
alike, and so that only the pixels of the crop are ever computed: Pillow's
`resize(size, box=...)` is resizing the whole and cropping then, to the rounding of a
gray level (labels agree exactly). U2PL resizes by PyTorch, without antialias; its
floats are rounded to a gray level here: crops travel in bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from mpmc_jax.data.decode import Picture
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

# Bytes of the padding, by the unit mean of a data set's images. AugSeg pads with
# ImageNet's mean, truncated; U2PL and AEL pad with zeros what is normalized already.
FILLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "black": np.zeros_like,
    "mean": lambda mean: np.floor(255 * mean),
    "nearest_mean": lambda mean: np.rint(255 * mean),
}


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How large crops are and how images may be scaled.

    Attributes:
      size: side of the square crop, in pixels.
      scale_min: least factor of the random resize.
      scale_max: greatest.
      scale_base: the long side that factors refer to; 0 means the image's own.
      flip: whether to mirror horizontally half of the time.
      fill: color of the padding, a key of `FILLS`.
    """

    size: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    scale_base: int = 0
    flip: bool = True
    fill: str = "black"

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
    """Where a crop comes from; every geometry draws one."""

    def extent(self) -> np.ndarray:
        """(4,) int32: top, left, bottom, right of the real pixels on the canvas."""
        ...

    def image(
        self, picture: Picture, crop: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """Picture -> (size,size,c) of the format's type."""
        ...

    def label(self, label_hw: np.ndarray, crop: CropConfig) -> np.ndarray:
        """(h,w) uint8 -> (size,size) uint8, by nearest neighbor."""
        ...


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a crop comes from and where it lies on the canvas.

    Attributes:
      resized: rows and columns of the whole image after resizing.
      window: (top, left, bottom, right) of the crop in the resized image.
      flip: whether the window is mirrored.
      column, row: of the canvas, where the window begins.
      antialias: resampled as by Pillow; else as by PyTorch's interpolate.
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
        """(4,) int32: top, left, bottom, right of the real pixels on the canvas."""
        top, left, bottom, right = self.window
        height, width = bottom - top, right - left
        return np.array(
            [self.row, self.column, self.row + height, self.column + width], np.int32
        )

    def image(
        self, picture: Picture, crop: CropConfig, pixels: PixelFormat
    ) -> np.ndarray:
        """See `Cut`; bilinear."""
        resample = _resize_window if self.antialias else _interpolate_window
        window = resample(picture, self)
        if window.ndim == 2:
            window = window[..., None]
        canvas = np.empty((crop.size, crop.size, pixels.channels), window.dtype)
        canvas[:] = fill_color(crop.fill, pixels)
        return self._on_canvas(window, canvas)

    def label(self, label_hw: np.ndarray, crop: CropConfig) -> np.ndarray:
        """See `Cut`; padded with `label_fill`.

        By index: Pillow's `box` is in single precision, which at ties would not give
        the pixel that resizing the whole map gives.
        """
        top, left, bottom, right = self.window
        pick = nearest if self.antialias else floored
        rows = pick(label_hw.shape[0], self.resized[0])[top:bottom]
        columns = pick(label_hw.shape[1], self.resized[1])[left:right]
        canvas = np.full((crop.size, crop.size), self.label_fill, np.uint8)
        return self._on_canvas(label_hw[rows[:, None], columns[None, :]], canvas)

    def _on_canvas(self, window: np.ndarray, canvas: np.ndarray) -> np.ndarray:
        top, left, bottom, right = self.extent()
        canvas[top:bottom, left:right] = window[:, ::-1] if self.flip else window
        return canvas


def size_of(picture: Picture) -> tuple[int, int]:
    """Rows and columns."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    rows, columns, _ = picture.shape
    return rows, columns


def fill_color(name: str, pixels: PixelFormat) -> np.ndarray:
    """(c,) the stored value of the padding `name`, in every channel."""
    return pixels.stored(FILLS[name](np.array(pixels.mean)) / 255)


def to_bytes(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Stored values -> unit values in 255 levels, truncated; bytes stay as they are.

    Source: UniMatch, more-scenarios/medical/dataset/acdc.py, its unlabeled slices.
    """
    if array.dtype == np.uint8:
        return array
    low, high = (np.array(v, np.float32) for v in (pixels.low, pixels.high))
    unit = (array.astype(np.float32) - low) / (high - low)
    return np.clip(unit * np.float32(255), 0, 255).astype(np.uint8)


def interpolation_taps(
    length: int, resized: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of PyTorch's interpolate along one axis, by pixel of [start, stop) resized.

    Returns:
      The two source pixels, and the weight of the second.
    """
    position = (np.arange(start, stop) + 0.5) * length / resized - 0.5
    position = np.maximum(position, 0).astype(np.float32)
    first = position.astype(int)
    return first, np.minimum(first + 1, length - 1), position - first


def window_box(
    placement: Placement, size: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the window lies in an image of `size`: its rows, and its columns."""
    top, left, bottom, right = placement.window
    down, across = size[0] / placement.resized[0], size[1] / placement.resized[1]
    # Rounding must not carry the box over the border.
    return (
        (top * down, min(bottom * down, size[0])),
        (left * across, min(right * across, size[1])),
    )


def _interpolate_window(picture: Picture, placement: Placement) -> np.ndarray:
    """Two taps an axis around the half-pixel position, and no antialias."""
    top, left, bottom, right = placement.window

    pixels = np.asarray(picture)
    dtype = pixels.dtype
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    width, resized = pixels.shape[1], placement.resized[1]
    across_low, across_high, across = interpolation_taps(width, resized, left, right)
    # Columns that the window does not touch are left out from the beginning.
    begin = across_low[0]
    pixels = pixels[:, begin : across_high[-1] + 1]
    low, high, down = interpolation_taps(len(pixels), placement.resized[0], top, bottom)
    down, across = down[:, None, None], across[None, :, None]
    lines = pixels[low] * (1 - down) + pixels[high] * down
    window = lines[:, across_low - begin] * (1 - across)
    window += lines[:, across_high - begin] * across
    return _as_type(window, dtype)


def _resize_window(picture: Picture, placement: Placement) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        # Pillow resizes one channel of floats at a time.
        planes = [
            _resize_window(Image.fromarray(plane.astype(np.float32)), placement)
            for plane in np.moveaxis(picture, -1, 0)
        ]
        return _as_type(np.stack(planes, axis=-1), picture.dtype)
    top, left, bottom, right = placement.window
    (low_row, high_row), (low_column, high_column) = window_box(
        placement, (picture.height, picture.width)
    )
    box = (low_column, low_row, high_column, high_row)
    size = (right - left, bottom - top)
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, box=box))


def _as_type(window: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "f":
        window = np.floor(window + 0.5)
    return window.astype(dtype)


def nearest(length: int, resized: int) -> np.ndarray:
    """(resized,) source position of each pixel, as Pillow computes it.

    Pillow adds up the step, so that at ties its rounding decides; the sum is repeated
    here because the published crops were made with it.
    """
    steps = np.full(resized, length / resized)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(int)


def floored(length: int, resized: int) -> np.ndarray:
    """(resized,) source position of each pixel, as PyTorch computes it."""
    return np.arange(resized) * length // resized
