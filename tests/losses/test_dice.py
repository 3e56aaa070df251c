"""The Dice loss against a slow oracle, its properties, and over devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax import losses
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.training.objective import SupervisedLoss

SHAPE, CLASSES = (4, 5, 6), 3


def example(seed: int, spread: float = 2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (*SHAPE, CLASSES)).astype(np.float32)
    labels = rng.choice([0, 1, 2, 255], SHAPE)
    weights = (rng.random(SHAPE) * (rng.random(SHAPE) < 0.7)).astype(np.float32)
    return logits, labels, weights


def oracle(logits, labels, weights) -> float:
    """One pixel and one class at a time, in float64."""
    dice = []
    for c in range(logits.shape[-1]):
        overlap = s_size = t_size = 0.0
        for place in np.ndindex(labels.shape):
            if labels[place] >= logits.shape[-1]:
                continue
            z = logits[place].astype(float)
            s = np.exp(z[c] - z.max()) / np.exp(z - z.max()).sum()
            t = float(labels[place] == c)
            w = float(weights[place])
            overlap += w * s * t
            s_size += w * s**2
            t_size += w * t**2
        dice.append(1 - (2 * overlap + 1e-5) / (s_size + t_size + 1e-5))
    return float(np.mean(dice))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_oracle(seed):
    logits, labels, weights = example(seed)
    found = losses.dice_loss(logits, labels, weights=weights)
    np.testing.assert_allclose(found, oracle(logits, labels, weights), rtol=1e-5)
    found = losses.dice_loss(logits, labels)
    expected = oracle(logits, labels, np.ones(SHAPE))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


VALUE_AND_GRAD = jax.jit(
    jax.value_and_grad(lambda z, y, w: losses.dice_loss(z, y, weights=w))
)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 100.0]))
def test_properties(seed, spread):
    logits, labels, weights = example(seed, spread)
    value, gradient = VALUE_AND_GRAD(logits, labels, weights)
    chex.assert_tree_all_finite((value, gradient))
    assert 0 <= value <= 1
    uncounted = (weights == 0) | (labels == 255)
    assert not np.any(np.asarray(gradient)[uncounted])
    other = np.where(uncounted[..., None], -logits + 1, logits)
    np.testing.assert_allclose(VALUE_AND_GRAD(other, labels, weights)[0], value, 1e-6)
    order = np.random.default_rng(seed).permutation(len(labels))
    turned, moved = VALUE_AND_GRAD(logits[order], labels[order], weights[order])
    np.testing.assert_allclose(turned, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved, gradient[order], rtol=1e-4, atol=1e-6)


def test_nothing_counts():
    logits, labels, weights = example(0)
    value, gradient = VALUE_AND_GRAD(logits, labels, 0 * weights)
    assert value == 0 and not np.any(gradient)


def test_two_devices_equal_one():
    logits, labels, weights = example(5)
    totals = Reduction("devices", {})

    def local(z, y, w):
        return losses.dice_loss(z, y, weights=w, global_sum=totals.sum)

    split = [x.reshape((2, 2) + x.shape[1:]) for x in (logits, labels, weights)]
    value, gradient = jax.pmap(jax.value_and_grad(local), axis_name="devices")(*split)
    expected, whole = VALUE_AND_GRAD(logits, labels, weights)
    np.testing.assert_allclose(value, [expected] * 2, rtol=1e-6)
    # Each device's share of the gradient: no exchange, and none is lost.
    np.testing.assert_allclose(
        np.asarray(gradient).reshape(whole.shape), whole, rtol=1e-5, atol=1e-7
    )


def test_supervised_loss_is_the_mean_of_both():
    logits, labels, _ = example(1)
    counts = {"supervised": jnp.asarray(np.sum(labels != 255))}

    def loss(name: str, parts: int = 1):
        made = SupervisedLoss(name=name, group_size=2, threshold=0.7, min_kept=0)
        return made(logits, labels, Reduction(None, counts, parts), "supervised")

    dice = losses.dice_loss(logits, labels)
    np.testing.assert_allclose(loss("ce_dice"), (loss("ce") + dice) / 2, rtol=1e-6)
    expected = (loss("ce") + dice / 2) / 2
    np.testing.assert_allclose(loss("ce_dice", 2), expected, rtol=1e-6)
