"""A data set as it lies on disk, before it is prepared: files, classes, complaints.

Every data set is described by one `Source`. `check` reads it to find what is wrong,
`builders.base` writes it as ArrayRecord; nothing after preparation sees a source.
"""

import colorsys
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping

from mpmc_jax.data.decode import Color
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.pixels import PixelFormat


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
      mask: likewise, or None for an unlabeled image.
      volume: of which this is a slice, or "".
    """

    id: str
    image: Blob
    mask: Blob | None
    volume: str = ""

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
      palette: index -> color, for display and for decoding color masks.
      pixels: how images are stored, and normalized.
      splits: "train" and "val" -> samples, in order.
      problems: what is already known to be wrong; one line each.
      notes: what is right but may surprise; one line each.
      masks: how masks show classes.
      expected: split -> images of the published data set; {} where there is none.
      unpacked: whether images are prepared uncompressed: larger, decoded faster.
      ask_nodata: whether values of images that seem to stand for none are a problem.
      measure: whether the mean, deviation and (if deeper than bytes) range of `pixels`
        are to be those of the training images, which `check` measures.
      mend: what to do about masks with values that are no class; "" for a guess.
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
    mend: str = ""

    @property
    def partial(self) -> bool:
        """Whether a split holds another number of images than the published one."""
        return any(
            len(self.splits[split]) != count for split, count in self.expected.items()
        )

    def fingerprint(self, digests: Mapping[str, bytes] | None = None) -> str:
        """SHA-256 over classes, ids and the bytes of every image and mask.

        What changes how these bytes are read is covered as well.

        Args:
          digests: id -> `Sample.digest`, where they are known; None reads all files.
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
    """Distinct colors: hues by the golden ratio, two brightnesses in turn."""
    palette = []
    for i in range(num_classes):
        color = colorsys.hsv_to_rgb(0.618034 * i % 1, 0.65, 0.95 - 0.3 * (i % 2))
        red, green, blue = (round(255 * value) for value in color)
        palette.append((red, green, blue))
    return tuple(palette)
