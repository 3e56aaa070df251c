"""Pictures of predictions: colors, overlays, gray maps and panels."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpmc_jax.pixels import PixelFormat

Palette = Sequence[tuple[int, int, int]]

_VOID_COLOR = (0, 0, 0)
_OVERLAY_OPACITY = 0.5
_WHITE = 255
_MARGIN = 4
_CAPTION_HEIGHT = 16
# Pixels that are converted at a time: intermediate values take 8 bytes per channel.
_CHUNK = 1 << 20


def colorize(index: np.ndarray, palette: Palette) -> np.ndarray:
    """Colors class indices: (h,w) -> (h,w,3) uint8; unknown ones become black."""
    table = np.full((256, 3), _VOID_COLOR, np.uint8)
    table[: len(palette)] = palette
    return table[index]


def displayable(image: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Converts a stored image to (h,w,1 or 3) uint8.

    It is RGB if there are three or more channels, else the first channel.
    """
    shown = slice(1 if pixels.channels < 3 else 3)
    low, high = np.array(pixels.low)[shown], np.array(pixels.high)[shown]

    def convert(part: np.ndarray) -> np.ndarray:
        return np.rint(255 * np.clip((part - low) / (high - low), 0, 1))

    return _by_rows(convert, image[..., shown])


def overlay(
    image: np.ndarray, colors: np.ndarray, opacity: float = _OVERLAY_OPACITY
) -> np.ndarray:
    """Blends colors (h,w,3) with an image (h,w,1 or 3): (h,w,3) uint8."""

    def blend(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
        return np.round((1 - opacity) * image + opacity * colors)

    return _by_rows(blend, image, colors)


def _by_rows(
    function: Callable[..., np.ndarray], first: np.ndarray, *others: np.ndarray
) -> np.ndarray:
    """Applies a function to a few rows at a time; returns its values as uint8."""
    rows = max(_CHUNK // first.shape[1], 1)
    starts = range(0, max(len(first), 1), rows)
    parts = [
        function(*(x[start : start + rows] for x in (first, *others))).astype(np.uint8)
        for start in starts
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def heat_map(values: np.ndarray) -> np.ndarray:
    """Maps values (h,w) to gray levels (h,w,1) uint8; the least value is black."""
    low, high = float(values.min()), float(values.max())
    unit = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.round(255 * unit).astype(np.uint8)[..., None]


def as_png(picture: Image.Image, **options: Any) -> bytes:
    """Encodes a PNG file; `options` are those of Pillow."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


def panel(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> Image.Image:
    """Arranges pictures of one size in a grid with captions, one row per example.

    Args:
      rows: pictures (h,w,1 or 3) uint8, one per caption.
      captions: what each column shows.

    Raises:
      ValueError: the pictures differ in size, or a row does not match the captions.
    """
    sizes = {picture.shape[:2] for pictures in rows for picture in pictures}
    counts = {len(pictures) for pictures in rows}
    if len(sizes) != 1 or counts != {len(captions)}:
        raise ValueError(
            f"a panel needs pictures of one size, {len(captions)} per row; got sizes "
            f"{sorted(sizes)} and {sorted(counts)} per row"
        )
    height, width = (side + _MARGIN for side in sizes.pop())
    canvas = Image.new(
        "RGB",
        (len(captions) * width + _MARGIN, _CAPTION_HEIGHT + len(rows) * height),
        (_WHITE, _WHITE, _WHITE),
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, caption in enumerate(captions):
        left = _MARGIN + column * width
        draw.text((left, 2), caption, fill=(0, 0, 0), font=font)
        for row, pictures in enumerate(rows):
            rgb = np.broadcast_to(pictures[column], (*pictures[column].shape[:2], 3))
            canvas.paste(
                Image.fromarray(np.ascontiguousarray(rgb)),
                (left, _CAPTION_HEIGHT + row * height),
            )
    return canvas
