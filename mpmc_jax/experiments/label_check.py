"""Finds labels with which a trained run disagrees where it is confident."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from mpmc_jax.data import decode, masks, parallel_map
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.doctor.diagnose import Finding
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.evaluation import metrics
from mpmc_jax.experiments.run import Run
from mpmc_jax.text import shorten
from mpmc_jax.types import IGNORE_LABEL

_CONFIDENT = 0.95
# A mask is reported if the run disagrees with this share of the confident pixels, and
# with so many standard deviations more than with most masks.
_SHARE, _DEVIATIONS = 0.05, 5.0
# Fewer confident pixels, as a share of all labeled ones of a mask, say nothing of it.
_JUDGED = 0.05
# Of a normal distribution, per median absolute deviation.
_DEVIATION = 1.4826
# IoU on the validation split: of a class that the run has not learned, so that its
# labels are not compared; and the mean of a run that is often wrong itself.
_UNLEARNED, _POOR = 0.3, 0.5


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Pixels of one image by label and prediction.

    Attributes:
      sample: the image.
      every: (C,C) of all pixels, label by prediction; None outside of validation.
      sure: {(label, prediction): pixels} of confident predictions.
      labeled: number of labeled pixels.
    """

    sample: Sample
    every: np.ndarray | None
    sure: dict[tuple[int, int], int]
    labeled: int


def find_disagreements(run: Run, source: Source) -> list[Finding]:
    """Returns a warning for each mask that a run contradicts more than others.

    Labels of a class are left out if the run's IoU of it on the validation split is
    low: it says nothing about them.

    Raises:
      ValueError: the run has other classes than the data set.
    """
    if run.facts.class_names != source.class_names:
        raise ValueError(
            f"--workdir: the run was trained on the classes "
            f"{shorten([*run.facts.class_names], 12)}, and the data have "
            f"{shorten([*source.class_names], 12)}; give a run with these"
        )
    labeled = [s for split in source.splits.values() for s in split if s.mask]
    compared = parallel_map.with_progress(
        _count_all(run, source, labeled), len(labeled), "predicting"
    )
    counts = [each for each in compared if each is not None]
    size = len(source.class_names)
    confusion = sum(
        (each.every for each in counts if each.every is not None),
        np.zeros((size, size), np.int64),
    )
    scores = metrics.iou(confusion)
    poor = confusion.any(axis=1) & (scores < _UNLEARNED)
    unlearned = np.flatnonzero(poor).tolist()
    notes = []
    if unlearned:
        names = [f"{source.class_names[i]} ({scores[i]:.1%})" for i in unlearned]
        text = (
            f"labels of {shorten(names, 12)} are not compared with the run, whose IoU "
            f"of them on the validation images is below {_UNLEARNED:.0%}; a better run "
            "could judge them"
        )
        notes.append(Finding("note", text))
    mean = metrics.mean_iou(confusion) if confusion.any() else None
    return _contradicted(counts, frozenset(unlearned), mean, source) + notes


def _contradicted(
    counts: list[_Counts],
    unlearned: frozenset[int],
    mean_iou: float | None,
    source: Source,
) -> list[Finding]:
    """Returns a warning for each mask that is contradicted more than others.

    Args:
      counts: pixels by label and prediction of each image.
      unlearned: classes whose labels are left out.
      mean_iou: the run's mean IoU on the validation split, if there are labels.
      source: the data set.
    """
    found = []
    for each in counts:
        sure = {k: n for k, n in each.sure.items() if k[0] not in unlearned}
        if sure and sum(sure.values()) >= _JUDGED * each.labeled:
            found.append((each.sample, *_share(sure)))
    if not found:
        return []
    shares = np.array([share for _, share, _ in found])
    middle = np.median(shares)
    spread = _DEVIATION * np.median(np.abs(shares - middle))
    limit = max(_SHARE, middle + _DEVIATIONS * spread)
    score = "" if mean_iou is None else f" with mIoU {mean_iou:.1%} in validation"
    advice = "compare the two"
    if mean_iou is not None and mean_iou < _POOR:
        advice += "; with such a score the run may well be wrong"
    names = source.class_names
    findings = []
    for sample, share, pair in sorted(found, key=lambda each: -each[1]):
        if share > limit and pair is not None:
            label, prediction = pair
            text = (
                f"{sample.name('mask')}: a run{score} contradicts {share:.0%} of "
                "the labels that it judges with a confidence above "
                f"{_CONFIDENT} ({names[prediction]} instead of {names[label]}); "
                f"{advice}"
            )
            findings.append(Finding("warning", text, (sample.id,)))
    return findings


def _count_all(
    run: Run, source: Source, labeled: list[Sample]
) -> Iterator[_Counts | None]:
    """Predicts each labeled image; yields None for one that cannot be read."""
    held_out = {sample.id for sample in source.splits.get("val", ())}
    for sample in labeled:
        assert sample.mask is not None
        try:
            content = source_lib.read_bytes(sample.image)
            image = decode.decode_array(content, run.facts.pixels)
            content = source_lib.read_bytes(sample.mask)
            label_hw = masks.read_mask(content, source.masks).label_hw
        except (UnreadableImage, OSError):
            yield None
            continue
        probability_hwc = run.predictor.probabilities(image)
        if probability_hwc.shape[:2] != label_hw.shape:  # `check` reports it.
            yield None
            continue
        every, sure = _count(probability_hwc, label_hw)
        held = every if sample.id in held_out else None
        yield _Counts(sample, held, sure, int(every.sum()))


def _count(
    probability_hwc: np.ndarray, label_hw: np.ndarray
) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Counts pixels by label and prediction.

    Returns:
      (C,C) of all pixels; {(label, prediction): pixels} of confident predictions.
    """
    classes = probability_hwc.shape[-1]
    known = (label_hw != IGNORE_LABEL) & (label_hw < classes)
    sure = known & (probability_hwc.max(-1) > _CONFIDENT)
    codes = label_hw.astype(np.int64) * classes + probability_hwc.argmax(-1)
    every = np.bincount(codes[known], minlength=classes**2).reshape(classes, classes)
    values, pixels = np.unique(codes[sure], return_counts=True)
    pairs = map(divmod, values.tolist(), itertools.repeat(classes))
    return every, dict(zip(pairs, pixels.tolist(), strict=True))


def _share(
    sure: Mapping[tuple[int, int], int],
) -> tuple[float, tuple[int, int] | None]:
    """Returns which share of the labels confident predictions contradict.

    Args:
      sure: (label, prediction) -> pixels, at least one.

    Returns:
      The share; and the most frequent contradiction, label and prediction, if any.
    """
    wrong = {pair: n for pair, n in sure.items() if pair[0] != pair[1]}
    if not wrong:
        return 0.0, None
    return sum(wrong.values()) / sum(sure.values()), max(wrong, key=wrong.__getitem__)
