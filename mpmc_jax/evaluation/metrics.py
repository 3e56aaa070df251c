"""Metrics from integer counts: sum the counts of all parts, then compute the metric.

There are two kinds of counts. A confusion matrix (C,C), true class by predicted class,
gives the per-pixel metrics. Score histograms (2,C,BINS), first the negatives and then
the positives of every class, give the multi-label metrics of the patch classifier.
Devices count in int32; sums over batches must be in int64. Metrics are computed on the
host in float64.
"""

import jax.numpy as jnp
import numpy as np

from mpmc_jax.types import IGNORE_LABEL, Array

# Histogram bins have a width of 1/32 in the logit, a power of two, so that the edges
# are exact and zero (probability 1/2) is one of them. Binning logits instead of
# probabilities separates scores near 0 and 1, where those of rare classes lie.
_BINS_PER_UNIT = 32
_LARGEST_LOGIT = 16
BINS = 2 * _LARGEST_LOGIT * _BINS_PER_UNIT


def confusion_matrix(
    predictions: Array,
    labels: Array,
    num_classes: int,
    ignore_label: int = IGNORE_LABEL,
) -> Array:
    """Counts pixels by (true class, predicted class).

    Args:
      predictions: integer class of each pixel, any shape.
      labels: integer true class of each pixel, same shape.
      num_classes: C.
      ignore_label: label of the pixels that do not count.

    Returns:
      (C,C) int32, exact: true class by predicted class. A pixel whose label or
      prediction is not in 0..C-1 does not count.

    Raises:
      ValueError: the shapes differ.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions {predictions.shape} and labels {labels.shape} must have "
            "the same shape"
        )
    # Unsigned 8-bit values must not wrap when multiplied by C.
    label, prediction = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    counts = (
        (label != ignore_label)
        & (label >= 0)
        & (label < num_classes)
        & (prediction >= 0)
        & (prediction < num_classes)
    )
    cell = jnp.where(counts, label * num_classes + prediction, num_classes**2)
    # The last cell collects the pixels that do not count.
    cells = jnp.bincount(cell.reshape(-1), length=num_classes**2 + 1)
    return cells[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def _intersection_union(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    confusion = np.asarray(confusion, np.int64)
    intersection = np.diagonal(confusion)
    return intersection, confusion.sum(0) + confusion.sum(1) - intersection


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient in float64; nan where the denominator is 0."""
    out = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not nan; nan if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class: (C,C) -> (C,), nan for absent classes.

    A class is absent if it occurs neither in the labels nor in the predictions.
    """
    return _ratio(*_intersection_union(confusion))


def mean_iou(confusion: np.ndarray) -> float:
    """Mean IoU over the classes that occur in the labels or the predictions."""
    return _mean(iou(confusion))


def mean_iou_peer(confusion: np.ndarray) -> float:
    """Mean IoU as the published code bases compute it: the IoU of an absent class is 0.

    The IoU of a class is I / (U + 1e-10), and the mean is over all C classes.
    """
    intersection, union = _intersection_union(confusion)
    return float(np.mean(intersection / (union + 1e-10)))


def class_accuracy(confusion: np.ndarray) -> np.ndarray:
    """The recall of each class: (C,C) -> (C,).

    It is nan for a class without labeled pixels.
    """
    confusion = np.asarray(confusion, np.int64)
    return _ratio(np.diagonal(confusion), confusion.sum(1))


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Fraction of counted pixels that are predicted correctly; nan if none counts."""
    confusion = np.asarray(confusion, np.int64)
    return float(_ratio(np.trace(confusion), confusion.sum()))


def score_histogram(logits: Array, targets: Array, where: Array) -> Array:
    """Counts multi-label scores by target, class and logit.

    Args:
      logits: (b,h,w,C).
      targets: (b,h,w,C) bool, whether the class occurs in the patch.
      where: (b,h,w) bool, the patches that count.

    Returns:
      (2,C,BINS) int32: [0] patches without the class, [1] patches with it. Logits
      beyond +-16 are counted in the outermost bins.
    """
    num_classes = logits.shape[-1]
    place = jnp.floor((logits + _LARGEST_LOGIT) * _BINS_PER_UNIT)
    # A nan would be cast to an arbitrary bin; count it in the lowest one.
    place = jnp.nan_to_num(jnp.clip(place, 0, BINS - 1), nan=0.0).astype(jnp.int32)
    classes = jnp.arange(num_classes, dtype=jnp.int32)[None, None, None]
    cell = (targets.astype(jnp.int32) * num_classes + classes) * BINS + place
    size = 2 * num_classes * BINS
    cell = jnp.where(where[..., None], cell, size)
    cells = jnp.bincount(cell.reshape(-1), length=size + 1)
    return cells[:-1].reshape(2, num_classes, BINS).astype(jnp.int32)


def average_precision(histogram: np.ndarray) -> np.ndarray:
    """Average precision of each class: (2,C,BINS) -> (C,), nan without positives.

    AP = sum_n (R_n - R_{n-1}) P_n over descending thresholds; scores in a bin are tied.
    """
    negatives, positives = np.asarray(histogram, np.int64)[..., ::-1]
    found = positives.cumsum(-1)
    precision = _ratio(found, found + negatives.cumsum(-1))
    # Precision is undefined before the first score, where recall does not increase.
    area = (positives * np.nan_to_num(precision)).sum(-1)
    return _ratio(area, found[..., -1])


def mean_average_precision(histogram: np.ndarray) -> float:
    """Mean of the average precision over the classes that occur in a patch."""
    return _mean(average_precision(histogram))


def hamming_accuracy(histogram: np.ndarray) -> float:
    """Fraction of correct (patch, class) decisions at probability 1/2."""
    histogram = np.asarray(histogram, np.int64)
    negatives, positives = histogram
    right = negatives[:, : BINS // 2].sum() + positives[:, BINS // 2 :].sum()
    return float(_ratio(right, histogram.sum()))


def prevalence(histogram: np.ndarray) -> np.ndarray:
    """Fraction of the patches that contain each class: (2,C,BINS) -> (C,)."""
    negatives, positives = np.asarray(histogram, np.int64).sum(-1)
    return _ratio(positives, negatives + positives)


def constant_hamming_accuracy(histogram: np.ndarray) -> float:
    """The Hamming accuracy of the best prediction that is the same for all patches."""
    share = prevalence(histogram)
    return _mean(np.maximum(share, 1 - share))


def constant_mean_average_precision(histogram: np.ndarray) -> float:
    """The mean average precision of any prediction that is the same for all patches.

    All patches tie, so the precision of a class is its prevalence, at recall 1. The
    mean is over the classes that occur.
    """
    share = prevalence(histogram)
    return _mean(np.where(share > 0, share, np.nan))
