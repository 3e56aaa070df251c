"""Counts against slow exact ones, golden numbers, and what the figures mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax import evaluation
from mpmc_jax.evaluation import metrics
from tests.support.golden import collected


def _maps(seed, shape=(3, 17, 13), num_classes=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.2] = 255
    return rng.integers(0, num_classes, shape).astype(np.uint8), labels


def test_confusion_matrix_counts_pixel_by_pixel():
    predictions, labels = _maps(0)
    expected = np.zeros((5, 5), int)
    for prediction, label in zip(predictions.flat, labels.flat, strict=True):
        if label != 255:
            expected[label, prediction] += 1
    count = jax.jit(metrics.confusion_matrix, static_argnums=2)
    confusion = count(jnp.asarray(predictions), jnp.asarray(labels), 5)
    assert confusion.dtype == jnp.int32
    np.testing.assert_array_equal(confusion, expected)


def test_confusion_matrix_does_not_wrap_small_integers():
    value = jnp.full((4, 4), 199, jnp.uint8)
    confusion = metrics.confusion_matrix(value, value, 200)
    assert confusion[199, 199] == 16
    assert confusion.sum() == 16


def test_confusion_matrix_is_mergeable():
    predictions, labels = (jnp.asarray(a) for a in _maps(1))
    whole = metrics.confusion_matrix(predictions, labels, 5)
    parts = [
        metrics.confusion_matrix(p, y, 5)
        for p, y in zip(predictions, labels, strict=True)
    ]
    np.testing.assert_array_equal(whole, sum(parts))


def test_values_that_are_no_class_count_nowhere():
    predictions = jnp.asarray([0, 7, -1, 1])
    labels = jnp.asarray([0, 0, 0, 9])
    confusion = metrics.confusion_matrix(predictions, labels, 2)
    np.testing.assert_array_equal(confusion, [[1, 0], [0, 0]])


def test_another_ignore_label_frees_255():
    labels = jnp.asarray([255, 0])
    confusion = metrics.confusion_matrix(labels, labels, 256, ignore_label=0)
    assert confusion[255, 255] == 1
    assert confusion.sum() == 1


def test_confusion_matrix_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="same shape"):
        metrics.confusion_matrix(jnp.zeros((2, 3), int), jnp.zeros((3, 2), int), 2)


def test_figures_of_a_small_matrix():
    # Class 2 is only predicted, class 3 absent.
    confusion = np.array([[6, 1, 1, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(evaluation.iou(confusion), [0.6, 0.4, 0, np.nan])
    assert metrics.mean_iou(confusion) == pytest.approx(1 / 3)
    assert metrics.mean_iou_peer(confusion) == pytest.approx(0.25)
    np.testing.assert_allclose(
        metrics.class_accuracy(confusion), [0.75, 0.5, np.nan, np.nan]
    )
    assert metrics.pixel_accuracy(confusion) == pytest.approx(8 / 12)


def test_figures_without_any_pixel_are_nan():
    nothing = np.zeros((3, 3), int)
    assert np.isnan(metrics.mean_iou(nothing))
    assert np.isnan(metrics.pixel_accuracy(nothing))
    assert metrics.mean_iou_peer(nothing) == 0


@pytest.mark.parametrize("path", collected("confusion*.npz"))
def test_golden(path):
    golden = np.load(path)
    num_classes = len(golden["iou"])
    confusion = np.asarray(
        metrics.confusion_matrix(
            jnp.asarray(golden["predictions"]),
            jnp.asarray(golden["labels"]),
            num_classes,
        )
    )
    intersection = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    np.testing.assert_array_equal(intersection, golden["intersection"])
    np.testing.assert_array_equal(union, golden["union"])
    occurs = union > 0
    np.testing.assert_allclose(
        evaluation.iou(confusion)[occurs], golden["iou"][occurs], atol=1e-6
    )
    assert np.isnan(evaluation.iou(confusion)[~occurs]).all()
    assert metrics.mean_iou_peer(confusion) == pytest.approx(
        float(golden["miou_peer"]), abs=1e-6
    )
    assert metrics.mean_iou(confusion) == pytest.approx(
        float(golden["iou"][occurs].mean()), abs=1e-6
    )


def _scores(seed, shape=(4, 40, 41), num_classes=4):
    """Logits that know something of the targets; class 3 never occurs."""
    rng = np.random.default_rng(seed)
    share = np.array([0.5, 0.1, 0.02, 0.0])
    targets = rng.random((*shape, num_classes)) < share
    logits = rng.normal(size=targets.shape) + 2.0 * targets - 1.0
    return logits.astype(np.float32), targets, rng.random(shape) < 0.8


def _histogram(logits, targets, where):
    arrays = (jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(where))
    return np.asarray(jax.jit(metrics.score_histogram)(*arrays))


def _exact_average_precision(scores, truth):
    """Precision at the rank of every positive, averaged."""
    order = np.argsort(-scores)
    truth = truth[order]
    precision = truth.cumsum() / np.arange(1, truth.size + 1)
    return precision[truth].mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_average_precision_agrees_with_exact_ranks(seed):
    logits, targets, where = _scores(seed)
    binned = metrics.average_precision(_histogram(logits, targets, where))
    for c in range(3):
        exact = _exact_average_precision(logits[where][:, c], targets[where][:, c])
        # What is left is the order within a bin 1/32 wide.
        assert binned[c] == pytest.approx(exact, abs=0.02)
        assert binned[c] != pytest.approx(targets[where][:, c].mean(), abs=0.05)
    assert np.isnan(binned[3])


def test_average_precision_is_exact_on_scores_of_distinct_bins():
    rng = np.random.default_rng(0)
    scores = (rng.permutation(200) - 100) / 32 + 1 / 64
    truth = rng.random(200) < 0.3
    histogram = _histogram(
        scores[None, None, :, None], truth[None, None, :, None], np.ones((1, 1, 200))
    )
    exact = _exact_average_precision(scores, truth)
    assert metrics.average_precision(histogram)[0] == pytest.approx(exact, abs=1e-12)


def test_hamming_accuracy_is_exact():
    logits, targets, where = _scores(3)
    logits[0, 0, 0] = 0.0
    logits[0, 0, 1] = -1e-6
    expected = ((logits >= 0) == targets)[where].mean()
    histogram = _histogram(logits, targets, where)
    assert metrics.hamming_accuracy(histogram) == pytest.approx(expected, abs=1e-12)


def test_constant_predictions_are_the_ones_computed_directly():
    logits, targets, where = _scores(4)
    share = targets[where].mean(0)
    histogram = _histogram(logits, targets, where)
    np.testing.assert_allclose(metrics.prevalence(histogram), share)
    assert metrics.constant_hamming_accuracy(histogram) == pytest.approx(
        np.maximum(share, 1 - share).mean()
    )
    assert metrics.constant_mean_average_precision(histogram) == pytest.approx(
        share[:3].mean()
    )
    constant = _histogram(np.full_like(logits, -3.0), targets, where)
    assert metrics.mean_average_precision(constant) == pytest.approx(share[:3].mean())
    assert metrics.hamming_accuracy(constant) == pytest.approx((1 - share).mean())


def test_histogram_is_mergeable_and_counts_extremes():
    logits, targets, where = _scores(5)
    logits[0, 0, 0] = [np.nan, np.inf, -np.inf, 1e9]
    where[0, 0, 0] = True
    whole = _histogram(logits, targets, where)
    parts = sum(
        _histogram(logits[i : i + 1], targets[i : i + 1], where[i : i + 1])
        for i in range(4)
    )
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == where.sum() * 4
    assert whole[:, 1, -1].sum() == 1
    assert whole[:, 2, 0].sum() == 1
