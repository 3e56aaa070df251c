"""The objective against slow sums in NumPy, and its sums over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.training import objective, step_metrics
from mpmc_jax.types import Network, Outputs, Region, Supervised, View

B, S, C = 4, 6, 3


def _cross_entropy(logits, label):
    """Per pixel, 0 where void."""
    loss = np.zeros(label.shape)
    for place in np.ndindex(*label.shape):
        if label[place] < C:
            scores = logits[place].astype(np.float64)
            loss[place] = np.log(np.exp(scores).sum()) - scores[label[place]]
    return loss


@pytest.fixture
def supervised():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (B, S, S, C)).astype(np.float32)
    label = rng.choice([0, 1, 2, 255], (B, S, S))
    region = Region(valid=label != 255, real=label != 255)
    return Supervised(jnp.asarray(logits), {}, jnp.asarray(label), region)


def test_ohem_ranks_within_groups_and_averages_over_all(supervised):
    min_kept, threshold = 7, 0.2
    logits, label = np.asarray(supervised.logits), np.asarray(supervised.label)
    pixel = _cross_entropy(logits, label)
    kept = []
    for group in (slice(0, 2), slice(2, 4)):
        of_group, valid = pixel[group], label[group] != 255
        probability = np.where(valid, np.exp(-of_group), 1.0)
        bar = max(threshold, np.sort(probability.ravel())[min_kept - 1])
        kept += list(of_group[valid & (probability <= bar)])
    loss = objective.SupervisedLoss("ohem", 2, threshold, min_kept)
    found = loss(supervised.logits, supervised.label, Reduction(), "supervised")
    np.testing.assert_allclose(found, np.mean(kept), rtol=1e-5)


def _view(normalizer=None):
    rng = np.random.default_rng(1)
    valid = rng.random((B, S, S)) < 0.7
    return View(
        logits=jnp.asarray(rng.normal(0, 2, (B, S, S, C)), jnp.float32),
        taps={},
        image=jnp.zeros((B, S, S, 3)),
        target=jnp.asarray(rng.integers(0, C, (B, S, S))),
        weight=jnp.asarray(rng.random((B, S, S)), jnp.float32),
        region=Region(valid=jnp.asarray(valid), real=jnp.asarray(valid)),
        teacher=Network(None, {}, {}),
        normalizer=normalizer,
    )


@pytest.mark.parametrize("normalizer", [None, 17.5])
def test_a_view_divides_weighted_losses_by_its_own_divisor(normalizer):
    given = None if normalizer is None else jnp.asarray(normalizer)
    view = _view(given)
    valid = np.asarray(view.region.valid)
    pixel = _cross_entropy(np.asarray(view.logits), np.asarray(view.target))
    summed = (np.asarray(view.weight) * pixel)[valid].sum()
    divisor = valid.sum() if normalizer is None else normalizer
    counts = {"unlabeled": jnp.asarray(valid.sum())}
    found = objective.view_loss(view, Reduction(None, counts))
    np.testing.assert_allclose(found, summed / divisor, rtol=1e-5)


def test_sums_over_devices_have_global_values_and_local_gradients():
    x = jnp.arange(4.0) + 1

    def ratio(x):
        totals = Reduction("devices", {})
        return totals.sum(x) ** 2 / totals.sum(2 * x + 1)

    values, gradients = jax.pmap(jax.value_and_grad(ratio), axis_name="devices")(x)
    total = x.sum()
    np.testing.assert_allclose(values, total**2 / (2 * total + 4), rtol=1e-6)
    whole = jax.grad(lambda x: x.sum() ** 2 / (2 * x + 1).sum())(x)
    np.testing.assert_allclose(gradients, whole, rtol=1e-6)


def test_nothing_to_divide_by_gives_zero_and_finite_gradients():
    def loss(x):
        totals = Reduction(None, {"none": jnp.asarray(0)})
        return totals.mean("none", (x * 0).sum()) + totals.micro_batch_mean(
            (x * 0).sum(), jnp.asarray(0.0)
        )

    value, gradient = jax.value_and_grad(loss)(jnp.ones(3))
    assert value == 0 and np.isfinite(gradient).all()


def _shares(views, refined=None):
    refined = views if refined is None else refined
    found = step_metrics.view_metrics(views, refined, scale=0.5, alpha=0.25)
    return {k: (float(a), float(b)) for k, (a, b) in found.items()}


@pytest.mark.parametrize("loss", ["ce", "dice"])
def test_the_weight_of_the_unlabeled_loss_is_what_multiplies_it(loss):
    """Scale, alpha and coefficients, times lambda's mean where it does not cancel."""
    weight = np.random.default_rng(3).random((B, S, S)) < 0.4
    one = _view().replace(weight=jnp.asarray(weight, jnp.float32), loss=loss)
    views = (one, one.replace(coefficient=3.0, weight=1 - one.weight))
    known = one.replace(unlabeled=False)
    valid = np.asarray(one.region.valid)
    pixels = 2 * valid.sum()
    plain = _shares((*views, known))
    assert plain["confident"] == (valid.sum(), pixels)
    np.testing.assert_allclose(np.divide(*plain["unlabeled_weight"]), 0.5, rtol=1e-6)
    factors = np.random.default_rng(4).random((2, B, S, S))
    refined = tuple(
        view.replace(weight=view.weight * factor)
        for view, factor in zip(views, factors, strict=True)
    )
    a, b = weight & valid, ~weight & valid
    mean = (factors[0][a].sum() + 3 * factors[1][b].sum()) / (a.sum() + 3 * b.sum())
    found = _shares((*views, known), (*refined, known))
    expected = 0.5 * (mean if loss == "ce" else 1.0)
    np.testing.assert_allclose(
        np.divide(*found["unlabeled_weight"]), expected, rtol=1e-5
    )
    # The objective itself, with the same loss everywhere, grows by that factor.
    flat = [view.replace(logits=jnp.zeros_like(view.logits)) for view in refined]
    if loss == "ce":
        counts = {"unlabeled": jnp.asarray(valid.sum())}
        totals = Reduction(None, counts)
        summed = sum(v.coefficient * objective.view_loss(v, totals) for v in flat)
        share = (a.sum() + 3 * b.sum()) / valid.sum()
        np.testing.assert_allclose(
            0.125 * summed, expected / 4 * share * np.log(C), rtol=1e-5
        )


def test_without_a_confident_pixel_no_weight_is_counted():
    view = _view().replace(weight=jnp.zeros((B, S, S)))
    found = _shares((view,))
    assert found["confident"][0] == 0 < found["confident"][1]
    assert found["unlabeled_weight"] == (0, 0)
    assert _shares(()) == {}


def test_balanced_cross_entropy_weighs_classes_alike_and_keeps_weights():
    view = _view().replace(loss="balanced_ce")
    weight = np.where(np.random.default_rng(5).random((B, S, S)) < 0.6, 0.25, 0.0)
    view = view.replace(weight=jnp.asarray(weight, jnp.float32))
    valid, target = np.asarray(view.region.valid), np.asarray(view.target)
    pixel = _cross_entropy(np.asarray(view.logits), target)
    counted = valid & (weight > 0)
    total = counted.sum() / C
    means = [pixel[counted & (target == c)].mean() for c in range(C)]
    expected = 0.25 * total * np.sum(means) / valid.sum()
    totals = Reduction(None, {"unlabeled": jnp.asarray(valid.sum())})
    np.testing.assert_allclose(objective.view_loss(view, totals), expected, rtol=1e-5)
    # One class alone is plain cross-entropy.
    one = view.replace(target=jnp.ones_like(view.target))
    plain = objective.view_loss(one.replace(loss="ce"), totals)
    np.testing.assert_allclose(objective.view_loss(one, totals), plain, rtol=1e-6)


def test_classes_are_counted_where_images_are_real_and_labels_are_not_the_truth(
    supervised,
):
    rng = np.random.default_rng(6)
    real, truth = rng.random((2, B, S, S)) < 0.8
    view = _view()
    weight = jnp.asarray(rng.random((B, S, S)) < 0.5, jnp.float32)
    region = view.region.replace(real=jnp.asarray(real))
    view = view.replace(weight=weight, region=region, truth=jnp.asarray(truth))
    known = view.replace(unlabeled=False)
    outputs = Outputs((supervised,), (view, view, known), {}, {})
    found = step_metrics.class_pixels(outputs)
    label = np.asarray(supervised.label)
    assert found["label"].tolist() == [int(np.sum(label == c)) for c in range(C)]
    counted = np.asarray(region.valid) & real & ~truth & (np.asarray(weight) > 0)
    of_view = [np.sum(counted & (np.asarray(view.target) == c)) for c in range(C)]
    assert found["pseudo"].tolist() == [2 * n for n in of_view]
    assert list(step_metrics.class_pixels(outputs.replace(views=()))) == ["label"]


def test_a_term_without_a_pixel_is_no_number_in_the_log():
    counts = {"supervised": jnp.asarray(0), "s1": jnp.asarray(4)}
    names = ("loss", "loss_supervised", "loss_auxiliary", "loss_s1", "loss_contrast")
    terms = dict.fromkeys(names, jnp.asarray(0.5))
    shown = step_metrics.uncounted_as_nan(terms, Reduction(None, counts))
    assert [bool(np.isnan(shown[name])) for name in names] == [0, 1, 1, 0, 0]
