"""Geometry on the host: random resize, crop and flip of uint8 images.

Published orders (UniMatch, AugSeg, and one for U2PL and AEL):

    unimatch   resize, pad, crop, flip    the flip moves padding to the left
    augseg     resize, flip, pad, crop    padding always at the right
    u2pl       resize, flip, pad, crop    padding on both sides, labelled 0

Padding is at the bottom in the first two. A geometry first draws a `Placement` and then
applies it, so that image and label move alike, and so that only the pixels of the crop
are ever computed: Pillow's `resize(size, box=...)` is resizing the whole and cropping
then, to the rounding of a grey level (labels agree exactly). U2PL resizes by PyTorch,
without antialias; its floats are rounded to a grey level here: crops travel in bytes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from mpmc_jax.types import IGNORE_LABEL

# "mean": the ImageNet mean times 255, truncated, as AugSeg pads; "nearest_mean":
# rounded, since U2PL and AEL pad with zeros what is normalised already.
FILLS = {
    "black": (0, 0, 0),
    "mean": (123, 116, 103),
    "nearest_mean": (124, 116, 104),
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
      fill: colour of the padding, a key of `FILLS`.
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


def _draw_offset(rng: np.random.Generator, length: int, size: int) -> int:
    return int(rng.integers(0, max(length - size, 0), endpoint=True))


def _draw_long_side(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> tuple[int, int]:
    """Rows and columns with a random long side (integer, both ends included)."""
    long = max(size)
    base = config.scale_base or long
    low, high = int(config.scale_min * base), int(config.scale_max * base)
    drawn = max(int(rng.integers(low, high, endpoint=True)), 1)
    # The short side is rounded, halves up; the long side is what was drawn.
    rows, columns = (max(int(drawn * side / long + 0.5), 1) for side in size)
    return rows, columns


def draw_unimatch(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """UniMatch's crop of an image of `size` (rows, columns).

    Draws, in order: long side, column, row, flip.
    """
    rows, columns = _draw_long_side(rng, size, config)
    left = _draw_offset(rng, columns, config.size)
    top = _draw_offset(rng, rows, config.size)
    flip = bool(rng.random() < 0.5) and config.flip
    right, bottom = min(left + config.size, columns), min(top + config.size, rows)
    column = config.size - (right - left) if flip else 0
    return Placement((rows, columns), (top, left, bottom, right), flip, column)


def _window_before_flip(
    corner: tuple[int, int], resized: tuple[int, int], size: int, flip: bool
) -> tuple[int, int, int, int]:
    """The window in the resized image of a crop at `corner` of the flipped one."""
    (top, left), (rows, columns) = corner, resized
    right, bottom = min(left + size, columns), min(top + size, rows)
    if flip:
        left, right = columns - right, columns - left
    return top, left, bottom, right


def draw_augseg(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """AugSeg's crop of an image of `size` (rows, columns).

    Draws, in order: scale, flip, column, row. The scale is a long side where
    `scale_base` is given (VOC), else a factor whose products are floored (Cityscapes).
    The column counts in the mirrored image, as there the crop comes last.
    """
    if config.scale_base:
        rows, columns = _draw_long_side(rng, size, config)
    else:
        factor = rng.uniform(config.scale_min, config.scale_max)
        rows, columns = (max(int(factor * side), 1) for side in size)
    flip = bool(rng.random() < 0.5) and config.flip
    left = _draw_offset(rng, columns, config.size)
    top = _draw_offset(rng, rows, config.size)
    window = _window_before_flip((top, left), (rows, columns), config.size, flip)
    return Placement((rows, columns), window, flip, 0)


def draw_u2pl(
    rng: np.random.Generator, size: tuple[int, int], config: CropConfig
) -> Placement:
    """U2PL's and AEL's crop of an image of `size` (rows, columns).

    Draws, in order: whether to shrink (half of the time) or to enlarge, factor, flip,
    row, column. Both sides are floored, and padded on both ends.
    """
    if rng.random() < 0.5:
        factor = rng.uniform(config.scale_min, max(1.0, config.scale_min))
    else:
        factor = rng.uniform(min(1.0, config.scale_max), config.scale_max)
    rows, columns = (max(int(factor * side), 1) for side in size)
    flip = bool(rng.random() < 0.5) and config.flip
    top = _draw_offset(rng, rows, config.size)
    left = _draw_offset(rng, columns, config.size)
    return Placement(
        (rows, columns),
        _window_before_flip((top, left), (rows, columns), config.size, flip),
        flip,
        column=max(config.size - columns, 0) // 2,
        row=max(config.size - rows, 0) // 2,
        antialias=False,
        label_fill=0,
    )


Geometry = Callable[[np.random.Generator, tuple[int, int], CropConfig], Placement]

GEOMETRIES: dict[str, Geometry] = {
    "unimatch": draw_unimatch,
    "augseg": draw_augseg,
    "u2pl": draw_u2pl,
}


def build_geometry(name: str) -> Geometry:
    """The geometry `name`.

    Raises:
      ValueError: there is none; the text lists the valid names.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"unknown geometry {name!r}; one of {sorted(GEOMETRIES)}")
    return GEOMETRIES[name]


def _interpolate_window(image: Image.Image, placement: Placement) -> np.ndarray:
    """Two taps an axis around the half-pixel position, and no antialias."""
    top, left, bottom, right = placement.window

    def taps(length: int, resized: int, start: int, stop: int):
        position = (np.arange(start, stop) + 0.5) * length / resized - 0.5
        position = np.maximum(position, 0).astype(np.float32)
        first = position.astype(int)
        return first, np.minimum(first + 1, length - 1), position - first

    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    width, resized = pixels.shape[1], placement.resized[1]
    across_low, across_high, across = taps(width, resized, left, right)
    # Columns that the window does not touch are left out from the beginning.
    begin = across_low[0]
    pixels = pixels[:, begin : across_high[-1] + 1]
    low, high, down = taps(len(pixels), placement.resized[0], top, bottom)
    down, across = down[:, None, None], across[None, :, None]
    lines = pixels[low] * (1 - down) + pixels[high] * down
    window = lines[:, across_low - begin] * (1 - across)
    window += lines[:, across_high - begin] * across
    return np.floor(window + 0.5).astype(np.uint8)


def _resize_window(image: Image.Image, placement: Placement) -> np.ndarray:
    rows, columns = placement.resized
    top, left, bottom, right = placement.window
    across, down = image.width / columns, image.height / rows
    # Rounding must not carry the box over the border.
    box = (
        left * across,
        top * down,
        min(right * across, image.width),
        min(bottom * down, image.height),
    )
    size = (right - left, bottom - top)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def _on_canvas(
    window: np.ndarray, placement: Placement, canvas: np.ndarray
) -> np.ndarray:
    top, left, bottom, right = placement.extent()
    canvas[top:bottom, left:right] = window[:, ::-1] if placement.flip else window
    return canvas


def crop_image(
    image: Image.Image, placement: Placement, config: CropConfig
) -> np.ndarray:
    """PIL image of mode L or RGB -> (size,size,1 or 3) uint8, bilinear."""
    resample = _resize_window if placement.antialias else _interpolate_window
    window = resample(image, placement)
    if window.ndim == 2:
        window = window[..., None]
    fill = np.array(FILLS[config.fill], np.uint8)
    if window.shape[-1] == 1:
        fill = fill.mean(keepdims=True).astype(np.uint8)
    canvas = np.empty((config.size, config.size, window.shape[-1]), np.uint8)
    canvas[:] = fill
    return _on_canvas(window, placement, canvas)


def _nearest(length: int, resized: int) -> np.ndarray:
    """(resized,) source position of each pixel, as Pillow computes it.

    Pillow adds up the step, so that at ties its rounding decides; the sum is repeated
    here because the published crops were made with it.
    """
    steps = np.full(resized, length / resized)
    steps[0] *= 0.5
    return np.cumsum(steps).astype(int)


def _floored(length: int, resized: int) -> np.ndarray:
    """(resized,) source position of each pixel, as PyTorch computes it."""
    return np.arange(resized) * length // resized


def crop_label(
    label_hw: np.ndarray, placement: Placement, config: CropConfig
) -> np.ndarray:
    """(h,w) uint8 labels -> (size,size), nearest neighbour, padded with its fill.

    By index: Pillow's `box` is in single precision, which at ties would not give the
    pixel that resizing the whole map gives.
    """
    top, left, bottom, right = placement.window
    nearest = _nearest if placement.antialias else _floored
    rows = nearest(label_hw.shape[0], placement.resized[0])[top:bottom]
    columns = nearest(label_hw.shape[1], placement.resized[1])[left:right]
    canvas = np.full((config.size, config.size), placement.label_fill, np.uint8)
    return _on_canvas(label_hw[rows[:, None], columns[None, :]], placement, canvas)
