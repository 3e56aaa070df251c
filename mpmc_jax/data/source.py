"""A data set as it lies on disk, before it is prepared: files, classes, complaints.

Every data set is described by one `Source`. `check` reads it to find what is wrong,
`builders.base` writes it as ArrayRecord; nothing after preparation sees a source.
"""

import colorsys
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, UnidentifiedImageError

from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

Color = tuple[int, int, int]


class UnreadableImage(ValueError):
    """An image or mask that cannot be turned into pixels; the text says why."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """A file that becomes an image or mask when it is read.

    Attributes:
      origin: the file, or its bytes; these are what the fingerprint covers.
      name: how messages call it.
      convert: bytes of the file -> encoded bytes of an image; raises UnreadableImage.
    """

    origin: pathlib.Path | bytes
    name: str
    convert: Callable[[bytes], bytes]


Blob = pathlib.Path | bytes | Derived


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image, with or without its mask.

    Attributes:
      id: name of the example, unique in its data set.
      image: a file, the encoded bytes of one, or what is derived from one.
      mask: likewise, or None for an unlabelled image.
    """

    id: str
    image: Blob
    mask: Blob | None

    def name(self, part: str) -> str:
        """How messages call the "image" or "mask" of this sample."""
        blob = getattr(self, part)
        if isinstance(blob, Derived):
            return blob.name
        return f"{self.id} ({part})" if isinstance(blob, bytes) else str(blob)

    def digest(self) -> bytes:
        """SHA-256 of the image's file, then of the mask's (of nothing, without one)."""
        contents = (
            b"" if blob is None else read_original(blob)
            for blob in (self.image, self.mask)
        )
        return b"".join(hashlib.sha256(content).digest() for content in contents)


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
      expected: split -> images of the published data set; {} where there is none.
      unpacked: whether images are prepared uncompressed: larger, decoded faster.
      mend: what to do about masks with values that are no class; "" for a guess.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pixels: PixelFormat
    splits: dict[str, tuple[Sample, ...]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    colors: dict[Color, int] | None = None
    expected: dict[str, int] = dataclasses.field(default_factory=dict)
    unpacked: bool = False
    mend: str = ""

    @property
    def partial(self) -> bool:
        """Whether a split holds another number of images than the published one."""
        return any(
            len(self.splits[split]) != count for split, count in self.expected.items()
        )

    def fingerprint(self, digests: Mapping[str, bytes] | None = None) -> str:
        """SHA-256 over classes, ids and the bytes of every image and mask.

        Args:
          digests: id -> `Sample.digest`, where they are known; None reads all files.
        """
        digest = hashlib.sha256()
        head = (self.name, self.class_names, self.palette, self.pixels.channels)
        digest.update(repr(head).encode())
        digest.update(repr(sorted((self.colors or {}).items())).encode())
        for split, samples in sorted(self.splits.items()):
            for sample in samples:
                digest.update(f"\n{split}\t{sample.id}\t".encode())
                known = digests.get(sample.id) if digests else None
                digest.update(known or sample.digest())
        return digest.hexdigest()


def read_original(blob: Blob) -> bytes:
    """The bytes of the file that an image or mask is, or is derived from."""
    origin = blob.origin if isinstance(blob, Derived) else blob
    return origin if isinstance(origin, bytes) else origin.read_bytes()


def as_encoded(blob: Blob, original: bytes) -> bytes:
    """What `read_original` gave -> the encoded bytes of an image or mask.

    Raises:
      UnreadableImage: a file that the image cannot be derived from.
    """
    return blob.convert(original) if isinstance(blob, Derived) else original


def read_bytes(blob: Blob) -> bytes:
    """The encoded bytes of an image or mask; raises as `as_encoded`."""
    return as_encoded(blob, read_original(blob))


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
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            f"{error}; Pillow's pixel limit (Image.MAX_IMAGE_PIXELS) is kept, as files "
            "are not trusted: cut the image into tiles"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
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
            "a colour is; give the palette, or store class indices (a palette PNG that "
            "was flattened has lost them: take the original file again)"
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


def unpack(content: bytes, channels: int) -> bytes:
    """An 8-bit image -> the same as uncompressed BMP; raises as `decode_image`."""
    stream = io.BytesIO()
    decode_image(content, channels).save(stream, "BMP")
    return stream.getvalue()


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
