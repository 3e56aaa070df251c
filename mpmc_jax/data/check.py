"""Checks a data set's source: reads all images and masks and collects problems."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpmc_jax.data import (
    agreement,
    decode,
    masks,
    parallel_map,
    raster_formats,
    splits,
    statistics,
)
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.agreement import MaskFacts
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import has_control, printable, quantity, shorten
from mpmc_jax.types import IGNORE_LABEL

# Image (h,w,c), labels (h,w) if they can be read, digest of the image -> evidence.
Examine = Callable[[np.ndarray, np.ndarray | None, str], Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of checking one sample.

    Attributes:
      problems: what is wrong, one line each.
      digest: `Sample.digest`.
      moments: moments of the image, if the source asks for them and it can be read.
      pixel_digest: digest of the decoded image; "" if it cannot be read.
      mask: facts of the mask, if there is one and it can be read.
      evidence: what `examine` returned, if the image can be read.
    """

    problems: list[str]
    digest: bytes
    moments: statistics.Moments | None
    pixel_digest: str
    mask: MaskFacts | None
    evidence: Any = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of checking a data set.

    Attributes:
      problems: what is wrong, one line each; empty if the data set can be prepared.
      pixels: (256,) number of pixels of each label value, over all readable masks.
      images: (256,) number of masks in which each value occurs.
      present: id of each labeled sample -> the classes in its mask.
      digests: id -> `Sample.digest`, of every sample that can be read.
      measured: the pixel format, with mean, deviation and range of the training images
        if the source asks for them (`Source.measure`).
      warnings: what may spoil results, one line each; training repeats them.
      notes: what is right but may surprise, one line each.
      evidence: id -> what `examine` returned, of every image that can be read.
    """

    problems: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    present: dict[str, tuple[int, ...]]
    digests: dict[str, bytes]
    measured: PixelFormat
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)

    def table(self, class_names: tuple[str, ...]) -> str:
        """Formats a table: label values with names, pixels, shares and image counts."""
        values = sorted(
            {*range(len(class_names)), *np.flatnonzero(self.pixels).tolist()}
        )
        names = {**dict(enumerate(class_names)), IGNORE_LABEL: "(void)"}
        total = max(int(self.pixels.sum()), 1)
        rows = [f"{'value':>5}  {'class':<20}{'pixels':>14}{'share':>9}{'images':>8}"]
        for value in values:
            count, images = int(self.pixels[value]), int(self.images[value])
            rows.append(
                f"{value:>5}  {printable(names.get(value, '(no such class)')):<20}"
                f"{count:>14}{count / total:>9.2%}{images:>8}"
            )
        void = [key for key, classes in self.present.items() if not classes]
        if void:
            rows.append(f"note: masks without any class: {shorten(void)}")
        return "\n".join(rows + self.remarks())

    def remarks(self) -> list[str]:
        """Formats notes and warnings, one line each."""
        notes = [f"note: {printable(note)}" for note in self.notes]
        return notes + [f"warning: {printable(text)}" for text in self.warnings]


def check_source(source: Source, examine: Examine | None = None) -> Report:
    """Reads every image and mask once and collects all problems.

    Args:
      source: the data set.
      examine: what else to measure of each image.
    """
    problems = [*source.problems, *_check_names(source)]
    samples = [sample for split in source.splits.values() for sample in split]
    trained = {sample.id for sample in source.splits.get("train", ())}
    moments: statistics.Moments | None = None
    nodata = _Sentinels()
    conventions = agreement.Agreement(source)
    outcomes = parallel_map.map_with_progress(
        lambda sample: _check_sample(sample, source, examine), samples, "checking"
    )
    pixels, images_with = np.zeros(256, np.int64), np.zeros(256, np.int64)
    present, digests, pixel_digests, evidence = {}, {}, {}, {}
    for sample, outcome in zip(samples, outcomes, strict=True):
        problems += outcome.problems
        digests[sample.id] = outcome.digest
        pixel_digests[sample.id] = outcome.pixel_digest
        evidence[sample.id] = outcome.evidence
        if outcome.moments is not None:
            nodata.add(sample.name("image"), outcome.moments)
            if sample.id in trained:
                moments = outcome.moments.merge(moments)
        if outcome.mask is not None:
            counts = outcome.mask.counts
            conventions.add(outcome.mask)
            pixels += counts
            images_with += counts > 0
            seen = np.flatnonzero(counts[: len(source.class_names)])
            present[sample.id] = tuple(map(int, seen))
    ids = {split: [s.id for s in part] for split, part in source.splits.items()}
    if not source.problems:
        # An unreadable mask has its problem already, and may hold labels.
        assumed = {sample.id: (0,) for sample in samples if sample.mask is not None}
        problems += splits.check_labels(source.name, ids, assumed | present)
    problems += conventions.problems()
    if source.ask_nodata:
        problems += nodata.questions()
    given = source.pixels
    warnings, notes = _compare_images(source, pixel_digests)
    warnings += conventions.warnings()
    if given.nodata:  # The user may have forgotten others.
        warnings += nodata.questions()
    absent = note_absent(source.name, ids["train"], present, source.class_names)
    return Report(
        tuple(problems),
        pixels,
        images_with,
        present,
        digests,
        measured=given if moments is None else moments.describe(given),
        warnings=tuple(warnings),
        # Masks with problems may hold the classes that seem to be absent.
        notes=(*notes, *([] if problems else absent)),
        evidence={key: each for key, each in evidence.items() if each is not None},
    )


class _Sentinels:
    """Finds image values that seem to stand for missing data."""

    def __init__(self) -> None:
        self._all: statistics.Moments | None = None
        self._extremes: list[tuple[str, np.ndarray, np.ndarray]] = []

    def add(self, name: str, moments: statistics.Moments) -> None:
        """Adds the moments of the next image."""
        self._all = moments.merge(self._all)
        self._extremes.append((name, moments.low[:, 0], moments.high[:, 0]))

    def questions(self) -> list[str]:
        """Returns one line for each such value that is not declared."""
        found = self._all.sentinels() if self._all is not None else {}
        questions = []
        for value, channels in found.items():
            holders = [
                name
                for name, low, high in self._extremes
                if value in low or value in high
            ]
            # The fewest digits that identify a number in single precision.
            text = str(np.float32(value)).removesuffix(".0")
            questions.append(
                f"{holders[0]}: value {text} in channel {shorten(channels)}, far "
                f"from all others, in {quantity(len(holders), 'image')}: does it stand "
                f'for missing pixels? Write "nodata": [{text}] (and any others) in '
                'classes.json, or "nodata": [] if all values are measurements'
            )
        return questions


def _check_names(source: Source) -> list[str]:
    """Returns problems: repeated ids, and ids that lists and terminals cannot hold."""
    samples = [sample for part in source.splits.values() for sample in part]
    counts = collections.Counter(sample.id for sample in samples)
    again = [key for key, count in counts.items() if count > 1]
    problems = []
    if again and not source.problems:
        problems.append(f"{source.name}: ids that occur twice: {shorten(again)}")
    strange = [sample.name("image") for sample in samples if has_control(sample.id)]
    if strange:
        problems.append(
            f"{source.name}: names with line ends, control characters or bytes that "
            f"are not UTF-8: {shorten(strange)}; rename them"
        )
    return problems


def _compare_images(
    source: Source, pixel_digests: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Finds images that are equal in every pixel.

    Args:
      source: the data set.
      pixel_digests: id -> digest of the decoded image; "" if it could not be read.

    Returns:
      Warnings of images that are in two splits, and notes on those twice in one.
    """
    equal: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for split, samples in source.splits.items():
        for sample in samples:
            if digest := pixel_digests[sample.id]:
                equal[digest].append((split, sample.id))
    leaks, twins = [], []
    for group in equal.values():
        if len(group) > 1:
            several = len({split for split, _ in group}) > 1
            names = [f"{split}: {key}" if several else key for split, key in group]
            (leaks if several else twins).append(" = ".join(names))
    warnings, notes = [], []
    if leaks:
        warnings.append(
            f"{source.name}: {quantity(len(leaks), 'image')} in two splits, equal in "
            f"every pixel: {shorten(leaks)}; this makes results too good: remove them "
            "from one split"
        )
    if twins:
        notes.append(
            f"{source.name}: {quantity(len(twins), 'image')} more than once in a "
            f"split, equal in every pixel: {shorten(twins)}"
        )
    return warnings, notes


def note_absent(
    name: str,
    trained: Sequence[str],
    present: Mapping[str, Sequence[int]],
    class_names: Sequence[str],
) -> list[str]:
    """Returns a note on the classes that occur in no training mask, or []."""
    absent = splits.absent_classes(trained, present, class_names)
    if not absent:
        return []
    return [
        f"{name}: no training mask holds {shorten(absent)}; launch.train refuses that: "
        "label them, remove these classes, or pass "
        "--config.data.allow_absent_classes=True"
    ]


def _check_sample(sample: Sample, source: Source, examine: Examine | None) -> Outcome:
    problems = []
    size = moments = missing = facts = pixels_hwc = label_hw = None
    image = mask = b""
    pixel_digest = ""
    try:
        image = source_lib.read_original(sample.image)
        content = source_lib.as_encoded(sample.image, image)
        pixels_hwc = decode.decode_stored(content, source.pixels)
        missing = source.pixels.missing(pixels_hwc)
        raster_formats.check_finite(pixels_hwc, missing)
        size = pixels_hwc.shape[1::-1]
        pixel_digest = _pixel_digest(pixels_hwc)
        if source.measure:
            moments = statistics.moments(pixels_hwc, missing)
    except (UnreadableImage, OSError) as error:
        problems.append(f"{sample.name('image')}: {error}")
    if sample.mask is not None:
        try:
            mask = source_lib.read_original(sample.mask)
            content = source_lib.as_encoded(sample.mask, mask)
            found = masks.read_mask(content, source.masks)
            label_hw = found.label_hw
            problems += _check_size(sample, size, label_hw.shape[::-1])
            facts = agreement.mask_facts(
                sample.name("mask"), found, source.masks, missing
            )
            problems += _check_values(facts, source, label_hw)
        except (UnreadableImage, OSError) as error:
            problems.append(f"{sample.name('mask')}: {error}")
    evidence = None
    if examine is not None and pixels_hwc is not None and pixel_digest:
        known_hwc = pixels_hwc if missing is None else np.where(missing, 0, pixels_hwc)
        evidence = examine(known_hwc, label_hw, pixel_digest)
    digest = _digest(image, mask)
    return Outcome(problems, digest, moments, pixel_digest, facts, evidence)


def _check_size(
    sample: Sample, size: tuple[int, ...] | None, mask_size: tuple[int, ...]
) -> list[str]:
    """Returns a problem if mask and image differ in size."""
    if size is None or size == mask_size:
        return []
    mend = "give both the same size"
    if size == mask_size[::-1]:
        mend += "; the mask looks turned by 90 degrees: turn it back"
    elif abs(size[0] * mask_size[1] - size[1] * mask_size[0]) <= max(size + mask_size):
        mend += ": resize the mask with nearest neighbor"
    return [
        f"{sample.name('mask')}: {mask_size[0]}x{mask_size[1]}, but its image "
        f"{sample.name('image')} has {size[0]}x{size[1]} (width x height); {mend}"
    ]


def _digest(image: bytes, mask: bytes) -> bytes:
    """Returns `Sample.digest` of bytes that were read already."""
    return b"".join(hashlib.sha256(part).digest() for part in (image, mask))


def _pixel_digest(pixels_hwc: np.ndarray) -> str:
    """Returns SHA-256 of an image's size and values, whatever its encoding."""
    digest = hashlib.sha256(repr(pixels_hwc.shape).encode())
    digest.update(np.ascontiguousarray(pixels_hwc).data)
    return digest.hexdigest()


def _check_values(facts: MaskFacts, source: Source, label_hw: np.ndarray) -> list[str]:
    """Returns a problem if values are neither a class nor void.

    Nothing is checked if the source has no classes, which is a problem of its own.
    """
    num_classes = len(source.class_names)
    wrong = np.flatnonzero(facts.counts[num_classes:IGNORE_LABEL]) + num_classes
    if not num_classes or not wrong.size:
        return []
    values = [source.masks.value(label) for label in wrong.tolist()]
    wrong_hw = np.isin(label_hw, wrong)
    hint = source.value_hint or (
        masks.repaint(wrong_hw) + _value_hint(values, facts, source)
    )
    return [
        f"{facts.name}: values {shorten(values, 8)} are not below the class count "
        f"{num_classes}; {hint}"
    ]


def _value_hint(values: list[int], facts: MaskFacts, source: Source) -> str:
    """Guesses why a mask has these wrong values, and says what to do about it."""
    num_classes, path = len(source.class_names), source.masks.declared_in
    if source.masks.void and path:
        valid = [source.masks.value(label) for label in range(num_classes)]
        return (
            f'beside "void" in {path} the classes have the values {shorten(valid, 8)}'
        )
    shift = f'write "void": [0] in {path}' if path else "subtract one"
    if values == [num_classes] and not facts.counts[0]:
        return f"do labels start at 1? {shift}"
    if values == [num_classes]:
        hint = f"void must be 255, not {num_classes}; or is a class name missing?"
        if path:
            hint += f" If 0 is void and labels start at 1, {shift}"
        return hint
    if facts.has_palette:
        hint = "of a palette PNG indices count, not colors; void must be 255"
        if path:
            hint += f'. If colors are the classes, give them as "palette" in {path}'
        return hint
    return f"store class indices 0..{num_classes - 1}, and 255 for void"


def summary(source: Source) -> str:
    """Describes a source: images per split, class names and notes."""
    lines = []
    for split, samples in source.splits.items():
        labeled = sum(sample.mask is not None for sample in samples)
        lines.append(
            f"{source.name}/{split}: {quantity(len(samples), 'image')}, "
            f"{labeled} with mask"
        )
    kind = describe(source.pixels)
    names = ", ".join(map(printable, source.class_names))
    lines.append(f"{quantity(len(source.class_names), 'class')}, {kind}: {names}")
    lines += [f"note: {printable(note)}" for note in source.notes]
    if source.partial:
        lines.append(
            "warning: PARTIAL, the counts differ from the published ones; every result "
            "of this data set will say so"
        )
        lines.append(f"{'split':>8}{'found':>8}{'published':>11}")
        lines += [
            f"{split:>8}{len(source.splits[split]):>8}{count:>11}"
            for split, count in source.expected.items()
        ]
    return "\n".join(lines)


def describe(pixels: PixelFormat) -> str:
    """Describes the images of a pixel format: their channels and type."""
    if decode.is_picture(pixels):
        return {1: "gray", 3: "RGB"}[pixels.channels]
    return f"{quantity(pixels.channels, 'channel')} of {pixels.dtype}"


def failure(report: Report) -> str:
    """Formats all problems, one per line, under a heading."""
    count = len(report.problems)
    heading = f"{count} problem{'s' if count > 1 else ''}"
    return "\n".join([heading, *(f"  {printable(line)}" for line in report.problems)])
