"""Draws masks from annotated shapes: polygons, bitmaps and run lengths.

A `Drawing` is what the annotation formats have in common. Its JSON is the origin of a
`Derived` mask, so that the fingerprint of a data set covers it. A pixel is inside a
polygon if its center is, where pixel (0, 0) has its center at (0.5, 0.5).
"""

import base64
import dataclasses
import io
import json
import zlib

import numpy as np
from PIL import Image

from mpmc_jax.data import raster_formats
from mpmc_jax.data.decode import encode_png
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Derived
from mpmc_jax.text import first_line
from mpmc_jax.types import IGNORE_LABEL

# A coordinate that no image has.
_FAR = 1e6
# What shapes that are no shapes raise.
_UNDRAWABLE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One annotated region.

    Attributes:
      name: name of its class.
      rings: polygons as lists of [x, y]; a point inside an even number of them, such as
        in a hole, is outside.
      bitmap: base64 of a PNG (perhaps compressed by zlib) whose pixels above 0 are
        inside; "" for none.
      corner: column and row of the bitmap's first pixel.
      runs: run lengths of COCO, its "segmentation" object; None for others.
    """

    name: str
    rings: tuple = ()
    bitmap: str = ""
    corner: tuple[int, int] = (0, 0)
    runs: dict | None = None


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The shapes of one image, drawn in this order.

    Attributes:
      size: rows and columns of the image.
      shapes: the regions.
    """

    size: tuple[int, int]
    shapes: tuple[Shape, ...]

    def as_mask(self, name: str, labels: dict[str, int], ground: int) -> Derived:
        """Returns a mask of this drawing.

        Args:
          name: name for messages.
          labels: class name -> label; other names are void.
          ground: label of the pixels outside all shapes.
        """
        shapes = [
            {**dataclasses.asdict(shape), "label": labels.get(shape.name, IGNORE_LABEL)}
            for shape in self.shapes
        ]
        content = {"size": self.size, "ground": ground, "shapes": shapes}
        return Derived(json.dumps(content).encode(), name, draw)


def draw(content: bytes) -> bytes:
    """Draws the JSON of a `Drawing`; returns a PNG of its labels.

    Raises:
      UnreadableImage: a shape that cannot be drawn.
    """
    drawing = json.loads(content)
    height, width = drawing["size"]
    raster_formats.check_bytes((height, width), np.dtype(np.uint8))
    label_hw = np.full((height, width), drawing["ground"], np.uint8)
    for shape in drawing["shapes"]:
        try:
            if shape["runs"] is not None:
                label_hw[_decode_runs(shape["runs"], height, width)] = shape["label"]
            elif shape["bitmap"]:
                _paste(label_hw, shape)
            else:
                fill(label_hw, shape["rings"], shape["label"])
        except _UNDRAWABLE as error:
            raise UnreadableImage(
                f"a shape of {shape['name']!r} cannot be drawn "
                f"({first_line(error)}); mend or remove it"
            ) from error
    return encode_png(label_hw)


def fill(label_hw: np.ndarray, rings: list, label: int) -> None:
    """Sets the pixels whose centers are inside an odd number of rings."""
    height, width = label_hw.shape
    toggled_hw = np.zeros((height, width + 1), np.uint8)
    for ring in rings:
        points = np.asarray(ring, float).reshape(-1, 2)
        if not (np.abs(points) < _FAR).all():
            raise ValueError("a corner is far outside the image")
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            low, high = min(y0, y1), max(y0, y1)
            # The rows whose centers lie in [low, high).
            first = max(int(np.ceil(low - 0.5)), 0)
            rows = np.arange(first, min(int(np.ceil(high - 0.5)), height))
            if rows.size:
                x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                columns = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
                toggled_hw[rows, columns] ^= 1
    inside_hw = np.bitwise_xor.accumulate(toggled_hw, axis=1)[:, :width]
    label_hw[inside_hw > 0] = label


def _paste(label_hw: np.ndarray, shape: dict) -> None:
    content = base64.b64decode(shape["bitmap"])
    if not content.startswith(b"\x89PNG"):
        raster_formats.check_deflated(content)
        content = zlib.decompress(content)
    image = Image.open(io.BytesIO(content), formats=("PNG",))
    raster_formats.check_bytes((*image.size, 4), np.dtype(np.uint8))
    # Supervisely's bitmaps may have the shape in their transparency.
    band = "A" if image.mode in ("LA", "RGBA") else 0
    inside_hw = np.asarray(image.getchannel(band)) > 0
    (x, y), (height, width) = shape["corner"], inside_hw.shape
    if x < 0 or y < 0:
        raise ValueError(f"its corner ({x}, {y}) is outside the image")
    part_hw = label_hw[y : y + height, x : x + width]
    part_hw[inside_hw[: part_hw.shape[0], : part_hw.shape[1]]] = shape["label"]


def _decode_runs(runs: dict, height: int, width: int) -> np.ndarray:
    """Decodes run lengths of COCO, column by column, to bool (h,w)."""
    if tuple(runs["size"]) != (height, width):
        raise ValueError(f"its size is {runs['size']}, the image's {[height, width]}")
    counts = runs["counts"]
    if isinstance(counts, str):
        counts = _unpack_counts(counts)
    if sum(counts) != height * width:
        raise ValueError(f"its runs are {sum(counts)} pixels, not {height * width}")
    inside = np.repeat(np.arange(len(counts)) % 2, counts)
    return inside.reshape(width, height).T > 0


def _unpack_counts(text: str) -> list[int]:
    """Unpacks run lengths that COCO's tools packed as text.

    Characters hold five bits of a number, the lowest first, and a sixth if more follow.
    From the fourth number on, differences from the second last are stored.
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        bits = ord(char) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # A negative number.
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts
