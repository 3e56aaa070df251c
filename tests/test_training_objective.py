"""The objective against slow sums in NumPy, and its sums over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.training import objective
from mpmc_jax.types import Network, Region, Supervised, View

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
    found = loss(supervised.logits, supervised.label, objective.Totals(None, {}))
    np.testing.assert_allclose(found, np.mean(kept), rtol=1e-5)


def _view(normaliser=None):
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
        normaliser=normaliser,
    )


@pytest.mark.parametrize("normaliser", [None, 17.5])
def test_a_view_divides_weighted_losses_by_its_own_divisor(normaliser):
    given = None if normaliser is None else jnp.asarray(normaliser)
    view = _view(given)
    valid = np.asarray(view.region.valid)
    pixel = _cross_entropy(np.asarray(view.logits), np.asarray(view.target))
    summed = (np.asarray(view.weight) * pixel)[valid].sum()
    divisor = valid.sum() if normaliser is None else normaliser
    counts = {"unlabeled": jnp.asarray(valid.sum())}
    found = objective.view_loss(view, objective.Totals(None, counts))
    np.testing.assert_allclose(found, summed / divisor, rtol=1e-5)


def test_sums_over_devices_have_global_values_and_local_gradients():
    x = jnp.arange(4.0) + 1

    def ratio(x):
        totals = objective.Totals("devices", {})
        return totals.sum(x) ** 2 / totals.sum(2 * x + 1)

    values, gradients = jax.pmap(jax.value_and_grad(ratio), axis_name="devices")(x)
    total = x.sum()
    np.testing.assert_allclose(values, total**2 / (2 * total + 4), rtol=1e-6)
    whole = jax.grad(lambda x: x.sum() ** 2 / (2 * x + 1).sum())(x)
    np.testing.assert_allclose(gradients, whole, rtol=1e-6)


def test_nothing_to_divide_by_gives_zero_and_finite_gradients():
    def loss(x):
        totals = objective.Totals(None, {"none": jnp.asarray(0)})
        return totals.mean("none", (x * 0).sum()) + totals.local_mean(
            (x * 0).sum(), jnp.asarray(0.0)
        )

    value, gradient = jax.value_and_grad(loss)(jnp.ones(3))
    assert value == 0 and np.isfinite(gradient).all()
