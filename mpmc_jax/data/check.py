"""Finds what is wrong with a data set before anything is trained on it."""

import collections
import dataclasses
import hashlib

import numpy as np

from mpmc_jax.data import images, statistics, work
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.lists import shorten
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import IGNORE_LABEL

# Of one sample: problems, (256,) label counts if it has a mask, digest, moments of the
# image where they are asked for, and the digest of its decoded image ("" unread).
Outcome = tuple[list[str], np.ndarray | None, bytes, statistics.Moments | None, str]


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `check_source`.

    Attributes:
      problems: one line each; empty if the data set can be prepared.
      pixels: (256,) pixels of each label value, over all readable masks.
      images: (256,) masks in which each value occurs.
      present: id of each labelled sample -> the classes in its mask.
      digests: id -> `Sample.digest`, of every sample that could be read.
      measured: how images are stored, with the figures of the training images where
        the source asks for them (`Source.measure`).
    """

    problems: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    present: dict[str, tuple[int, ...]]
    digests: dict[str, bytes]
    measured: PixelFormat

    def table(self, class_names: tuple[str, ...]) -> str:
        """Label values with class names, pixels, shares and numbers of images."""
        values = sorted(
            {*range(len(class_names)), *np.flatnonzero(self.pixels).tolist()}
        )
        names = {**dict(enumerate(class_names)), IGNORE_LABEL: "(void)"}
        total = max(int(self.pixels.sum()), 1)
        rows = [f"{'value':>5}  {'class':<20}{'pixels':>14}{'share':>9}{'images':>8}"]
        for value in values:
            count, images = int(self.pixels[value]), int(self.images[value])
            rows.append(
                f"{value:>5}  {names.get(value, '(no such class)'):<20}{count:>14}"
                f"{count / total:>9.2%}{images:>8}"
            )
        absent = [name for i, name in enumerate(class_names) if not self.pixels[i]]
        if absent:
            rows.append(
                f"note: no mask holds {shorten(absent)}; training asks for "
                "data.allow_absent_classes=True then, or for classes without them"
            )
        void = [key for key, classes in self.present.items() if not classes]
        if void:
            rows.append(f"note: none of the classes in the masks of {shorten(void)}")
        return "\n".join(rows)


def check_source(source: Source) -> Report:
    """Reads and decodes every image and mask once; collects all problems."""
    problems = list(source.problems)
    samples = [sample for split in source.splits.values() for sample in split]
    trained = {sample.id for sample in source.splits.get("train", ())}
    moments: statistics.Moments | None = None
    outcomes = work.go_through(
        lambda sample: _check_sample(sample, source), samples, "checking"
    )
    pixels, images_with = np.zeros(256, np.int64), np.zeros(256, np.int64)
    present = {}
    digests = {}
    for sample, outcome in zip(samples, outcomes, strict=True):
        found, counts, digest, of_image, _ = outcome
        problems += found
        digests[sample.id] = digest
        if of_image is not None and sample.id in trained:
            moments = of_image if moments is None else moments.merge(of_image)
        if counts is not None:
            pixels += counts
            images_with += counts > 0
            seen = np.flatnonzero(counts[: len(source.class_names)])
            present[sample.id] = tuple(map(int, seen))
    if not source.problems:
        problems += _check_splits(source)
    if len(source.class_names) == 2 and pixels[IGNORE_LABEL] and not pixels[1]:
        problems.append(
            f"{source.name}: masks hold 0 and 255 and never 1, and 255 is void; if it "
            f'is {source.class_names[1]!r}, write "binary": true in classes.json'
        )
    measured = source.pixels
    if moments is not None:
        measured = moments.describe(measured)
    return Report(tuple(problems), pixels, images_with, present, digests, measured)


def _check_splits(source: Source) -> list[str]:
    problems = []
    for split, samples in source.splits.items():
        if not any(sample.mask is not None for sample in samples):
            problems.append(
                f"{source.name}: no labelled image in split {split!r}; an id list may "
                f"be empty ({split}.txt)"
            )
    ids = [sample.id for samples in source.splits.values() for sample in samples]
    again = [key for key, count in collections.Counter(ids).items() if count > 1]
    if again:
        problems.append(f"{source.name}: ids that occur twice: {shorten(again)}")
    return problems


def _check_sample(sample: Sample, source: Source) -> Outcome:
    problems = []
    size = moments = None
    image = mask = b""
    looks = ""
    try:
        image = source_lib.read_original(sample.image)
        content = source_lib.as_encoded(sample.image, image)
        pixels_hwc = images.decode_array(content, source.pixels)
        size = pixels_hwc.shape[1::-1]
        looks = _pixel_digest(pixels_hwc)
        if source.measure:
            moments = statistics.moments(pixels_hwc)
    except (UnreadableImage, OSError) as error:
        problems.append(f"{sample.name('image')}: {error}")
    if sample.mask is None:
        return problems, None, _digest(image, mask), moments, looks
    name = sample.name("mask")
    try:
        mask = source_lib.read_original(sample.mask)
        content = source_lib.as_encoded(sample.mask, mask)
        label_hw = images.decode_mask(content, source.colors)
    except (UnreadableImage, OSError) as error:
        problems.append(f"{name}: {error}")
        return problems, None, _digest(image, mask), moments, looks
    mask_size = label_hw.shape[::-1]
    if size is not None and size != mask_size:
        problems.append(
            f"{name}: {mask_size[0]}x{mask_size[1]}, but its image "
            f"{sample.name('image')} has {size[0]}x{size[1]} (width x height); give "
            "both the same size"
        )
    counts = np.bincount(label_hw.ravel(), minlength=256)
    problems += _check_values(name, content, counts, source)
    return problems, counts, _digest(image, mask), moments, looks


def _digest(image: bytes, mask: bytes) -> bytes:
    """`Sample.digest`, of what was read already."""
    return b"".join(hashlib.sha256(part).digest() for part in (image, mask))


def _pixel_digest(pixels_hwc: np.ndarray) -> str:
    """SHA-256 of an image's size and values, however its file encodes them."""
    digest = hashlib.sha256(repr(pixels_hwc.shape).encode())
    digest.update(np.ascontiguousarray(pixels_hwc).data)
    return digest.hexdigest()


def _check_values(
    name: str, content: bytes, counts: np.ndarray, source: Source
) -> list[str]:
    """Complains of values that are neither a class nor void; none without classes."""
    num_classes = len(source.class_names)
    wrong = np.flatnonzero(counts[num_classes:IGNORE_LABEL]) + num_classes
    if not num_classes or not wrong.size:
        return []
    picture = images.open_image(content)
    if source.mend:
        mend = source.mend
    elif picture.format == "JPEG":
        mend = "JPEG changes values; store masks as PNG"
    elif wrong.tolist() == [num_classes] and not counts[0]:
        mend = "do labels start at 1? subtract one"
    elif wrong.tolist() == [num_classes]:
        mend = f"void must be 255, not {num_classes}; or is a class name missing?"
    elif picture.mode == "P":
        mend = "a palette PNG: its indices count, not its colours; void must be 255"
    else:
        mend = f"store class indices 0..{num_classes - 1}, and 255 for void"
    return [
        f"{name}: values {shorten(wrong.tolist(), 8)} are not below the class count "
        f"{num_classes}; {mend}"
    ]


def summary(source: Source) -> str:
    """Images of each split, the class names and the notes, for people."""
    lines = []
    for split, samples in source.splits.items():
        labeled = sum(sample.mask is not None for sample in samples)
        lines.append(
            f"{source.name}/{split}: {len(samples)} images, {labeled} with mask"
        )
    kind = _describe(source.pixels)
    names = ", ".join(source.class_names)
    lines.append(f"{len(source.class_names)} classes, {kind}: {names}")
    lines += [f"note: {note}" for note in source.notes]
    if source.partial:
        lines.append(
            "warning: PARTIAL, the counts differ from the published ones; every result "
            "made from this data set says so"
        )
        lines.append(f"{'split':>8}{'found':>8}{'published':>11}")
        lines += [
            f"{split:>8}{len(source.splits[split]):>8}{count:>11}"
            for split, count in source.expected.items()
        ]
    return "\n".join(lines)


def _describe(pixels: PixelFormat) -> str:
    if images.is_bytes(pixels):
        return {1: "grey", 3: "RGB"}[pixels.channels]
    return f"{pixels.channels} channels of {pixels.dtype}"


def failure(report: Report) -> str:
    """All problems, one a line, under a heading."""
    count = len(report.problems)
    heading = f"{count} problem{'s' if count > 1 else ''}"
    return "\n".join([heading, *(f"  {line}" for line in report.problems)])
