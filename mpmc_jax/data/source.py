"""A data set as it lies on disk, before it is prepared: files, classes, complaints.

Every data set is described by one `Source`. `check` reads it to find what is wrong,
`builders.base` writes it as ArrayRecord; nothing after preparation sees a source.
"""

import colorsys
import dataclasses
import hashlib
import io
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

Color = tuple[int, int, int]


class UnreadableImage(ValueError):
    """An image or mask that cannot be turned into pixels; the text says why."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image, with or without its mask.

    Attributes:
      id: name of the example, unique in its data set.
      image: a file, or the encoded bytes of one.
      mask: likewise, or None for an unlabelled image.
    """

    id: str
    image: pathlib.Path | bytes
    mask: pathlib.Path | bytes | None

    def name(self, part: str) -> str:
        """How messages call the "image" or "mask" of this sample."""
        blob = getattr(self, part)
        return f"{self.id} ({part})" if isinstance(blob, bytes) else str(blob)


@dataclasses.dataclass(frozen=True)
class Source:
    """All that is known of a data set before its pixels are looked at.

    Attributes:
      name: the data set.
      class_names: index -> name.
      palette: index -> colour, for display and for decoding colour masks.
      pixels: how images are stored, and normalised.
      splits: "train" and "val" -> samples, in order.
      problems: what is already known to be wrong; one line each.
      notes: what is right but may surprise; one line each.
      colors: colour -> label of masks stored in colour (IGNORE_LABEL for void), or
        None where masks hold class indices only.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pixels: PixelFormat
    splits: dict[str, tuple[Sample, ...]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    colors: dict[Color, int] | None = None

    def fingerprint(self) -> str:
        """SHA-256 over classes, ids and the bytes of every image and mask."""
        digest = hashlib.sha256()
        head = (self.name, self.class_names, self.palette, self.pixels.channels)
        digest.update(repr(head).encode())
        digest.update(repr(sorted((self.colors or {}).items())).encode())
        for split, samples in sorted(self.splits.items()):
            for sample in samples:
                digest.update(f"\n{split}\t{sample.id}\t".encode())
                for blob in (sample.image, sample.mask):
                    content = b"" if blob is None else read_bytes(blob)
                    digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def read_bytes(blob: pathlib.Path | bytes) -> bytes:
    """The encoded bytes of an image or mask."""
    return blob if isinstance(blob, bytes) else blob.read_bytes()


def default_palette(num_classes: int) -> tuple[Color, ...]:
    """Distinct colours: hues by the golden ratio, two brightnesses in turn."""
    palette = []
    for i in range(num_classes):
        color = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.95 - 0.3 * (i % 2))
        red, green, blue = (round(255 * value) for value in color)
        palette.append((red, green, blue))
    return tuple(palette)


def open_image(content: bytes) -> Image.Image:
    """Opens encoded bytes and decodes them in full.

    Raises:
      UnreadableImage: not an image, a truncated one, or more than 8 bits a channel.
    """
    if not content:
        raise UnreadableImage("an empty file")
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"truncated or damaged ({error})") from error
    return image


def decode_image(content: bytes, channels: int) -> Image.Image:
    """Encoded bytes -> 8-bit image with 1 (mode L) or 3 (RGB) channels.

    Raises:
      UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    if image.mode[0] in "IF":
        raise UnreadableImage(
            f"more than 8 bits a channel (PIL mode {image.mode}); convert it to 8 bits"
        )
    return image.convert("L" if channels == 1 else "RGB")


def decode_array(content: bytes, channels: int) -> np.ndarray:
    """Encoded bytes -> (h,w,channels) uint8; raises as `decode_image`."""
    image = np.asarray(decode_image(content, channels))
    return image[..., None] if image.ndim == 2 else image


def decode_mask(content: bytes, colors: dict[Color, int] | None = None) -> np.ndarray:
    """Encoded bytes -> (h,w) class indices, 255 for void.

    Grey values and palette indices are taken as they are, whatever colour a palette
    gives them; masks in colour are looked up in `colors`.

    Raises:
      UnreadableImage: see `open_image`; or a colour mask whose colours are unknown.
    """
    image = open_image(content)
    if image.mode in ("L", "P"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image, np.uint8)
    if image.mode[0] == "I":
        return _narrow(np.asarray(image))
    if colors is None:
        raise UnreadableImage(
            f"a colour mask (PIL mode {image.mode}), and no palette says which class "
            "a colour is; give the palette, or store class indices"
        )
    return _look_up(np.asarray(image.convert("RGB")), colors)


def _narrow(values: np.ndarray) -> np.ndarray:
    if values.max() > IGNORE_LABEL:
        raise UnreadableImage(
            f"holds label {values.max()}; labels are 8 bits, with 255 for void"
        )
    return values.astype(np.uint8)


def _look_up(rgb_hwc: np.ndarray, colors: dict[Color, int]) -> np.ndarray:
    packed_hw = rgb_hwc.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1])
    label_hw = np.zeros(packed_hw.shape, np.uint8)
    known_hw = np.zeros(packed_hw.shape, bool)
    for (red, green, blue), label in colors.items():
        here_hw = packed_hw == (red << 16 | green << 8 | blue)
        label_hw[here_hw] = label
        known_hw |= here_hw
    if not known_hw.all():
        unknown = [tuple(map(int, c)) for c in np.unique(rgb_hwc[~known_hw], axis=0)]
        raise UnreadableImage(
            f"holds {len(unknown)} colours that the palette lacks: "
            f"{shorten(unknown)}; add them, or list them under void"
        )
    return label_hw


def encode_png(array: np.ndarray) -> bytes:
    """(h,w) or (h,w,3) uint8 -> PNG, written quickly rather than small."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def shorten(items: list, limit: int = 5) -> str:
    """A list for an error message: the first few, then how many more."""
    text = ", ".join(map(str, items[:limit]))
    rest = len(items) - limit
    return text if rest <= 0 else f"{text} and {rest} more"
