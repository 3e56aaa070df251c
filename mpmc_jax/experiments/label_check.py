"""Finds labels with which a trained run disagrees where it is confident."""

from collections.abc import Iterator

import numpy as np

from mpmc_jax.data import decode, masks, parallel_map
from mpmc_jax.data import source as source_lib
from mpmc_jax.data.doctor.diagnose import Finding
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.experiments.run import Run
from mpmc_jax.text import shorten
from mpmc_jax.types import IGNORE_LABEL

_CONFIDENT = 0.95
# A mask is reported if the run disagrees with this share of the confident pixels, and
# with so many standard deviations more than with most masks.
_SHARE, _DEVIATIONS = 0.05, 5.0
# Of a normal distribution, per median absolute deviation.
_DEVIATION = 1.4826


def find_disagreements(run: Run, source: Source) -> list[Finding]:
    """Returns a warning for each mask that a run contradicts more than others.

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
        _compare_all(run, source, labeled), len(labeled), "predicting"
    )
    found = [each for each in compared if each is not None]
    shares = np.array([share for _, share, _ in found])
    if not found:
        return []
    middle = np.median(shares)
    spread = _DEVIATION * np.median(np.abs(shares - middle))
    limit = max(_SHARE, middle + _DEVIATIONS * spread)
    worst = sorted((each for each in found if each[1] > limit), key=lambda e: -e[1])
    return [
        Finding(
            "warning",
            f"{sample.name('mask')}: a run contradicts {share:.0%} of its labels with "
            f"a confidence above {_CONFIDENT}{pair}; look at it and mend it",
            (sample.id,),
        )
        for sample, share, pair in worst
    ]


def _compare_all(
    run: Run, source: Source, labeled: list[Sample]
) -> Iterator[tuple[Sample, float, str] | None]:
    """Yields the share of contradicted labels and the main confusion per image."""
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
        share, pair = compare(run.predictor.probabilities(image), label_hw)
        names = source.class_names
        text = f" ({names[pair[1]]} instead of {names[pair[0]]})" if pair else ""
        yield sample, share, text


def compare(
    probability_hwc: np.ndarray, label_hw: np.ndarray
) -> tuple[float, tuple[int, int] | None]:
    """Compares labels with predictions.

    Returns:
      The share of contradicted labels among those with a confident prediction; and the
      most frequent contradiction, label and prediction, if there is any.
    """
    classes = probability_hwc.shape[-1]
    predicted_hw = probability_hwc.argmax(-1)
    known = (label_hw != IGNORE_LABEL) & (label_hw < classes)
    sure = known & (probability_hwc.max(-1) > _CONFIDENT)
    labels, predicted = label_hw[sure].astype(int), predicted_hw[sure]
    wrong = labels != predicted
    if not wrong.any():
        return 0.0, None
    pairs = np.bincount(labels[wrong] * classes + predicted[wrong])
    label, prediction = divmod(int(pairs.argmax()), classes)
    return float(wrong.mean()), (label, prediction)
