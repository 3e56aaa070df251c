"""Finds what is wrong with a data set before anything is trained on it."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mpmc_jax.data import (
    agreement,
    masks,
    parallel_map,
    raster_formats,
    splits,
    statistics,
)
from mpmc_jax.data import (
    decode as images,
)
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.agreement import MaskFacts
from mpmc_jax.data.lists import has_control, printable, shorten
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import quantity
from mpmc_jax.types import IGNORE_LABEL


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `_check_sample` finds.

    Attributes:
      problems: one line each.
      digest: `Sample.digest`.
      moments: of the image, where the source measures them and it could be read.
      looks: digest of the decoded image, "" where it could not be read.
      mask: of the mask, where there is one and it could be read.
    """

    problems: list[str]
    digest: bytes
    moments: statistics.Moments | None
    looks: str
    mask: MaskFacts | None


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `check_source`.

    Attributes:
      problems: one line each; empty if the data set can be prepared.
      pixels: (256,) pixels of each label value, over all readable masks.
      images: (256,) masks in which each value occurs.
      present: id of each labeled sample -> the classes in its mask.
      digests: id -> `Sample.digest`, of every sample that could be read.
      measured: how images are stored, with the figures of the training images where
        the source asks for them (`Source.measure`).
      warnings: what spoils results, one line each; training repeats them.
      notes: what may surprise, one line each.
    """

    problems: tuple[str, ...]
    pixels: np.ndarray
    images: np.ndarray
    present: dict[str, tuple[int, ...]]
    digests: dict[str, bytes]
    measured: PixelFormat
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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
                f"{value:>5}  {printable(names.get(value, '(no such class)')):<20}"
                f"{count:>14}{count / total:>9.2%}{images:>8}"
            )
        void = [key for key, classes in self.present.items() if not classes]
        if void:
            rows.append(f"note: none of the classes in the masks of {shorten(void)}")
        return "\n".join(rows + self.remarks())

    def remarks(self) -> list[str]:
        """Notes and warnings as lines."""
        notes = [f"note: {printable(note)}" for note in self.notes]
        return notes + [f"warning: {printable(text)}" for text in self.warnings]


def check_source(source: Source) -> Report:
    """Reads and decodes every image and mask once; collects all problems."""
    problems = [*source.problems, *_check_names(source)]
    samples = [sample for split in source.splits.values() for sample in split]
    trained = {sample.id for sample in source.splits.get("train", ())}
    moments: statistics.Moments | None = None
    nodata = _Sentinels()
    alike = agreement.Agreement(source)
    outcomes = parallel_map.map_with_progress(
        lambda sample: _check_sample(sample, source), samples, "checking"
    )
    pixels, images_with = np.zeros(256, np.int64), np.zeros(256, np.int64)
    present = {}
    digests = {}
    looks = {}
    for sample, outcome in zip(samples, outcomes, strict=True):
        problems += outcome.problems
        digests[sample.id] = outcome.digest
        looks[sample.id] = outcome.looks
        if outcome.moments is not None:
            nodata.add(sample.name("image"), outcome.moments)
            if sample.id in trained:
                moments = outcome.moments.merge(moments)
        if outcome.mask is not None:
            counts = outcome.mask.counts
            alike.add(outcome.mask)
            pixels += counts
            images_with += counts > 0
            seen = np.flatnonzero(counts[: len(source.class_names)])
            present[sample.id] = tuple(map(int, seen))
    ids = {split: [s.id for s in part] for split, part in source.splits.items()}
    if not source.problems:
        # A mask that could not be read is named already; it may hold labels.
        there = {sample.id: (0,) for sample in samples if sample.mask is not None}
        problems += splits.check_labels(source.name, ids, there | present)
    problems += alike.problems()
    if source.ask_nodata:
        problems += nodata.questions()
    given = source.pixels
    measured = given if moments is None else moments.describe(given)
    warnings, notes = _compare_images(source, looks)
    warnings += alike.warnings()
    if given.nodata:  # Some are declared; perhaps others were forgotten.
        warnings += nodata.questions()
    absent = note_absent(source.name, ids["train"], present, source.class_names)
    return Report(
        tuple(problems),
        pixels,
        images_with,
        present,
        digests,
        measured,
        warnings=tuple(warnings),
        # A mask that was misread seems to lack classes.
        notes=(*notes, *([] if problems else absent)),
    )


class _Sentinels:
    """Finds values of images that seem to stand for no measurement."""

    def __init__(self) -> None:
        self._all: statistics.Moments | None = None
        self._extremes: list[tuple[str, np.ndarray, np.ndarray]] = []

    def add(self, name: str, moments: statistics.Moments) -> None:
        """Takes the figures of the next image."""
        self._all = moments.merge(self._all)
        self._extremes.append((name, moments.low[:, 0], moments.high[:, 0]))

    def questions(self) -> list[str]:
        """One line for each such value that is not declared."""
        found = self._all.sentinels() if self._all is not None else {}
        questions = []
        for value, channels in found.items():
            holders = [
                name
                for name, low, high in self._extremes
                if value in low or value in high
            ]
            # As few digits as tell it from other values of single precision.
            text = str(np.float32(value)).removesuffix(".0")
            questions.append(
                f"{holders[0]}: value {text} in channel {shorten(channels)}, far "
                f"from all others, in {quantity(len(holders), 'image')}: does it stand "
                f'for missing pixels? Write "nodata": [{text}] (and what else does) '
                'in classes.json, or "nodata": [] if all is measured'
            )
        return questions


def _check_names(source: Source) -> list[str]:
    """Complains of ids that occur twice, or that lists and terminals cannot hold."""
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
    source: Source, looks: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Warns of images that two splits share, notes those that one holds twice.

    Args:
      source: whose images are compared.
      looks: id -> digest of the decoded image, "" for one that could not be read.
    """
    equal: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for split, samples in source.splits.items():
        for sample in samples:
            if looks[sample.id]:
                equal[looks[sample.id]].append((split, sample.id))
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
            f"every pixel: {shorten(leaks)}; results on them are too good, so take "
            "them out of one"
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
    """A note on the classes that no training mask holds, or []."""
    absent = splits.absent_classes(trained, present, class_names)
    if not absent:
        return []
    return [
        f"{name}: no training mask holds {shorten(absent)}; launch.train refuses that: "
        "label them, remove these classes, or pass "
        "--config.data.allow_absent_classes=True"
    ]


def _check_sample(sample: Sample, source: Source) -> Outcome:
    problems = []
    size = moments = missing = facts = None
    image = mask = b""
    looks = ""
    try:
        image = source_lib.read_original(sample.image)
        content = source_lib.as_encoded(sample.image, image)
        pixels_hwc = images.decode_stored(content, source.pixels)
        missing = source.pixels.missing(pixels_hwc)
        raster_formats.check_finite(pixels_hwc, missing)
        size = pixels_hwc.shape[1::-1]
        looks = _pixel_digest(pixels_hwc)
        if source.measure:
            moments = statistics.moments(pixels_hwc, missing)
    except (UnreadableImage, OSError) as error:
        problems.append(f"{sample.name('image')}: {error}")
    if sample.mask is not None:
        try:
            mask = source_lib.read_original(sample.mask)
            content = source_lib.as_encoded(sample.mask, mask)
            found = masks.read_mask(content, source.masks)
            problems += _check_size(sample, size, found.label_hw.shape[::-1])
            facts = agreement.facts_of(
                sample.name("mask"), found, source.masks, missing
            )
            problems += _check_values(facts, source)
        except (UnreadableImage, OSError) as error:
            problems.append(f"{sample.name('mask')}: {error}")
    return Outcome(problems, _digest(image, mask), moments, looks, facts)


def _check_size(
    sample: Sample, size: tuple[int, ...] | None, mask_size: tuple[int, ...]
) -> list[str]:
    """Complains of a mask whose image has another width or height."""
    if size is None or size == mask_size:
        return []
    return [
        f"{sample.name('mask')}: {mask_size[0]}x{mask_size[1]}, but its image "
        f"{sample.name('image')} has {size[0]}x{size[1]} (width x height); give "
        "both the same size"
    ]


def _digest(image: bytes, mask: bytes) -> bytes:
    """`Sample.digest`, of what was read already."""
    return b"".join(hashlib.sha256(part).digest() for part in (image, mask))


def _pixel_digest(pixels_hwc: np.ndarray) -> str:
    """SHA-256 of an image's size and values, however its file encodes them."""
    digest = hashlib.sha256(repr(pixels_hwc.shape).encode())
    digest.update(np.ascontiguousarray(pixels_hwc).data)
    return digest.hexdigest()


def _check_values(facts: MaskFacts, source: Source) -> list[str]:
    """Complains of values that are neither a class nor void; none without classes."""
    num_classes = len(source.class_names)
    wrong = np.flatnonzero(facts.counts[num_classes:IGNORE_LABEL]) + num_classes
    if not num_classes or not wrong.size:
        return []
    values = [source.masks.value(label) for label in wrong.tolist()]
    mend = source.mend or _mend(values, facts, source)
    return [
        f"{facts.name}: values {shorten(values, 8)} are not below the class count "
        f"{num_classes}; {mend}"
    ]


def _mend(values: list[int], facts: MaskFacts, source: Source) -> str:
    """What to do about a mask of such values, by a guess at what they are."""
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
        mend = f"void must be 255, not {num_classes}; or is a class name missing?"
        if path:
            mend += f" If 0 is void and labels start at 1, {shift}"
        return mend
    if facts.has_palette:
        mend = "a palette PNG: its indices count, not its colors; void must be 255"
        if path:
            mend += f'. If colors are the classes, give them as "palette" in {path}'
        return mend
    return f"store class indices 0..{num_classes - 1}, and 255 for void"


def summary(source: Source) -> str:
    """Images of each split, the class names and the notes, for people."""
    lines = []
    for split, samples in source.splits.items():
        labeled = sum(sample.mask is not None for sample in samples)
        lines.append(
            f"{source.name}/{split}: {quantity(len(samples), 'image')}, "
            f"{labeled} with mask"
        )
    kind = _describe(source.pixels)
    names = ", ".join(map(printable, source.class_names))
    lines.append(f"{quantity(len(source.class_names), 'class')}, {kind}: {names}")
    lines += [f"note: {printable(note)}" for note in source.notes]
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
        return {1: "gray", 3: "RGB"}[pixels.channels]
    return f"{quantity(pixels.channels, 'channel')} of {pixels.dtype}"


def failure(report: Report) -> str:
    """All problems, one a line, under a heading."""
    count = len(report.problems)
    heading = f"{count} problem{'s' if count > 1 else ''}"
    return "\n".join([heading, *(f"  {printable(line)}" for line in report.problems)])
