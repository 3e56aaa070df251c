"""The description of a data set before it is prepared: files, classes, problems.

Every builder describes its folder as one `Source`. `check` looks for problems in it and
`builders.base` writes it as ArrayRecord. Nothing after preparation uses a `Source`.
"""

import colorsys
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

from mpmc_jax.data.decode import Color
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.pixels import PixelFormat


@dataclasses.dataclass(frozen=True)
class Derived:
    """An image or mask that is converted from another file, such as a volume.

    Attributes:
      origin: that file, or its bytes; the fingerprint covers them.
      name: name for messages.
      convert: bytes of the file -> encoded bytes of an image; raises UnreadableImage.
    """

    origin: pathlib.Path | bytes
    name: str
    convert: Callable[[bytes], bytes]


# Where an image or mask comes from: its file, its encoded bytes, or another file.
Blob = pathlib.Path | bytes | Derived


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image, with or without a mask.

    Attributes:
      id: id of the image, unique in its data set.
      image: where the image comes from.
      mask: where its mask comes from, or None for an unlabeled image.
      volume: id of the volume that this is a slice of, or "".
    """

    id: str
    image: Blob
    mask: Blob | None
    volume: str = ""

    def name(self, part: str) -> str:
        """Returns the name of this sample's "image" or "mask" for messages."""
        blob = getattr(self, part)
        if isinstance(blob, Derived):
            return blob.name
        return f"{self.id} ({part})" if isinstance(blob, bytes) else str(blob)

    def digest(self) -> bytes:
        """Returns SHA-256 of the image's file and of the mask's, concatenated.

        Without a mask the second is the hash of no bytes.
        """
        contents = (
            b"" if blob is None else read_original(blob)
            for blob in (self.image, self.mask)
        )
        return b"".join(hashlib.sha256(content).digest() for content in contents)


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known about a data set before its pixels are read.

    Attributes:
      name: name of the data set.
      class_names: index -> name.
      palette: index -> color, for display. The colors by which masks are decoded are
        `masks.colors`.
      pixels: how images are stored and normalized.
      splits: "train", "val" and perhaps "test" -> samples, in order.
      problems: what is already known to be wrong, one line each.
      notes: what is right but may surprise, one line each.
      masks: how masks store classes.
      expected: split -> number of images in the published data set; {} for others.
      unpacked: whether images are prepared uncompressed: larger but faster to decode.
      ask_nodata: whether it is a problem if image values look like missing data.
      measure: whether `check` measures mean, deviation and (except for bytes) range of
        the training images, which then replace those of `pixels`.
      value_hint: what to do about masks with values that are no class; "" if `check`
        shall guess.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[Color, ...]
    pixels: PixelFormat
    splits: dict[str, tuple[Sample, ...]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    masks: MaskFormat = MaskFormat()
    expected: dict[str, int] = dataclasses.field(default_factory=dict)
    unpacked: bool = False
    ask_nodata: bool = False
    measure: bool = False
    value_hint: str = ""

    @property
    def partial(self) -> bool:
        """Whether the number of images differs from the published data set's."""
        return any(
            len(self.splits[split]) != count for split, count in self.expected.items()
        )

    def fingerprint(self, digests: Mapping[str, bytes] | None = None) -> str:
        """Returns SHA-256 over classes, ids and the bytes of all images and masks.

        It also covers the settings that change how these bytes are read, but no code,
        such as that of `Derived.convert`.

        Args:
          digests: id -> `Sample.digest`, as far as known; other files are read.
        """
        digest = hashlib.sha256()
        head = (self.name, self.class_names, self.palette, self.pixels.channels)
        digest.update(repr(head).encode())
        digest.update(repr(sorted((self.masks.colors or {}).items())).encode())
        reading = (
            sorted(self.masks.void),
            self.masks.binary,
            sorted(map(str, self.pixels.nodata)),
        )
        if any(reading):
            digest.update(repr(reading).encode())
        for split, samples in sorted(self.splits.items()):
            for sample in samples:
                digest.update(f"\n{split}\t{sample.id}\t".encode())
                known = digests.get(sample.id) if digests else None
                digest.update(known or sample.digest())
        return digest.hexdigest()


def read_original(blob: Blob) -> bytes:
    """Returns the bytes of the file that an image or mask comes from."""
    origin = blob.origin if isinstance(blob, Derived) else blob
    return origin if isinstance(origin, bytes) else origin.read_bytes()


def as_encoded(blob: Blob, original: bytes) -> bytes:
    """Converts the result of `read_original` to encoded bytes of an image or mask.

    Raises:
      UnreadableImage: the file cannot be converted.
    """
    return blob.convert(original) if isinstance(blob, Derived) else original


def read_bytes(blob: Blob) -> bytes:
    """Returns the encoded bytes of an image or mask; raises as `as_encoded`."""
    return as_encoded(blob, read_original(blob))


def default_palette(class_names: Sequence[str]) -> tuple[Color, ...]:
    """Returns distinct colors: hues by the golden ratio, in alternating brightness.

    A first class called background is black.
    """
    palette = [(0, 0, 0)] if [*class_names[:1]] == ["background"] else []
    for i in range(len(class_names) - len(palette)):
        color = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.95 - 0.3 * (i % 2))
        red, green, blue = (round(255 * value) for value in color)
        palette.append((red, green, blue))
    return tuple(palette)
