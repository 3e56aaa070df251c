"""Pictures of predictions: index maps, colors, overlays and panels."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.pixels import PixelFormat

Palette = Sequence[tuple[int, int, int]]

_VOID_COLOR = (0, 0, 0)
_OVERLAY_OPACITY = 0.5
_WHITE = 255
_MARGIN = 4
_CAPTION_HEIGHT = 16
# The PNG text that marks pictures of predictions, and the bytes to search for it.
_SOFTWARE = ("Software", "mpmc_jax.launch.predict")
_HEAD = 2048
_KINDS = ("index", "color", "overlay")


def colorize(index: np.ndarray, palette: Palette) -> np.ndarray:
    """Colors class indices: (h,w) -> (h,w,3) uint8; unknown ones become black."""
    table = np.full((256, 3), _VOID_COLOR, np.uint8)
    table[: len(palette)] = palette
    return table[index]


def displayable(image: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Converts a stored image to (h,w,1 or 3) uint8.

    It is RGB if there are three or more channels, else the first channel.
    """
    low, high = np.array(pixels.low), np.array(pixels.high)
    unit = np.clip((image - low) / (high - low), 0, 1)
    return np.rint(255 * unit[..., : 1 if pixels.channels < 3 else 3]).astype(np.uint8)


def overlay(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Blends colors (h,w,3) with an image (h,w,1 or 3): (h,w,3) uint8."""
    mixed = (1 - _OVERLAY_OPACITY) * image + _OVERLAY_OPACITY * colors
    return np.round(mixed).astype(np.uint8)


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


def prediction_paths(stem: pathlib.Path) -> list[pathlib.Path]:
    """The paths of the files that `write_prediction` writes: STEM_index.png, ..."""
    return [stem.with_name(f"{stem.name}_{kind}.png") for kind in _KINDS]


def is_prediction(path: pathlib.Path) -> bool:
    """Whether a file is a picture that `write_prediction` wrote.

    Returns False for unreadable files.
    """
    if path.suffix != ".png" or not path.is_file():
        return False
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        return "\0".join(_SOFTWARE).encode() in file.read(_HEAD)


def write_prediction(
    stem: pathlib.Path, index: np.ndarray, image: np.ndarray, palette: Palette
) -> list[pathlib.Path]:
    """Writes STEM_index.png, STEM_color.png and STEM_overlay.png.

    Args:
      stem: path without a suffix; its folder must exist.
      index: (h,w) uint8 classes. The file is a palette PNG: its values are the
        classes, and viewers show the colors.
      image: (h,w,1 or 3) uint8.
      palette: class -> RGB.

    Returns:
      The three paths.
    """
    colors = colorize(index, palette)
    # A palette turns a gray picture into mode "P" and leaves its values unchanged.
    indexed = Image.fromarray(index)
    indexed.putpalette(colorize(np.arange(256), palette).tobytes())
    shown = (Image.fromarray(colors), Image.fromarray(overlay(image, colors)))
    mark = PngImagePlugin.PngInfo()
    mark.add_text(*_SOFTWARE)
    paths = prediction_paths(stem)
    for path, picture in zip(paths, (indexed, *shown), strict=True):
        write_bytes(path, as_png(picture, pnginfo=mark))
    return paths


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
