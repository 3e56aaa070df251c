from functools import partial

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from mpmc_jax import losses

SHAPE = (3, 2, 4)
CLASSES = 5
FULL = (*SHAPE, CLASSES)

LOGITS = hnp.arrays(
    np.float32,
    FULL,
    elements=st.floats(-1e4, 1e4, width=32) | st.floats(-4, 4, width=32),
)
TARGETS = hnp.arrays(np.float32, FULL, elements=st.sampled_from([0.0, 1.0]))
WHERE = hnp.arrays(np.bool_, SHAPE) | st.just(np.zeros(SHAPE, bool))

# Asymmetric focusing at the paper's exponents, at both zero, and at larger ones.
SCALARS = {
    "paper": losses.asymmetric_focal_loss,
    "plain": partial(losses.asymmetric_focal_loss, gamma_pos=0.0, gamma_neg=0.0),
    "strong": partial(losses.asymmetric_focal_loss, gamma_pos=0.5, gamma_neg=4.0),
    "binary_cross_entropy": losses.binary_cross_entropy,
}


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def reference_focal(logits, targets, gamma_pos, gamma_neg, where):
    """Equation 3-4 as printed, with the minus sign."""
    patches = []
    for index in zip(*np.nonzero(where), strict=True):
        classes = []
        for q, y in zip(sigmoid(logits[index]), targets[index], strict=True):
            if y:
                classes.append(-((1 - q) ** gamma_pos) * np.log(q))
            else:
                classes.append(-(q**gamma_neg) * np.log(1 - q))
        patches.append(np.mean(classes))
    return np.mean(patches)


def reference_bce(logits, targets, weights, where):
    """Equation 6 as printed, as a mean over patches."""
    q = sigmoid(logits)
    loss = -(targets * np.log(q) + (1 - targets) * np.log(1 - q))
    return (weights * loss).mean(-1)[where].mean()


def draw(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, FULL).astype(np.float32)
    return logits, rng.random(FULL) < 0.3, rng.random(SHAPE) < 0.7


@pytest.mark.parametrize(
    "gammas", [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0), (2.0, 4.0), (0.5, 0.25)]
)
def test_asymmetric_focal_loss_is_equation_3(gammas):
    logits, targets, where = draw()
    loss = losses.asymmetric_focal_loss(
        logits, targets, gamma_pos=gammas[0], gamma_neg=gammas[1], where=where
    )
    expected = reference_focal(logits, targets, *gammas, where)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_default_exponents_are_the_papers():
    logits, targets, _ = draw()
    explicit = losses.asymmetric_focal_loss(
        logits, targets, gamma_pos=0.0, gamma_neg=1.0
    )
    assert losses.asymmetric_focal_loss(logits, targets) == explicit
    swapped = losses.asymmetric_focal_loss(
        logits, targets, gamma_pos=1.0, gamma_neg=0.0
    )
    assert swapped != explicit


def test_binary_cross_entropy_is_equation_6():
    logits, _, where = draw()
    rng = np.random.default_rng(1)
    targets, weights = rng.random((2, *FULL)).astype(np.float32)
    loss = losses.binary_cross_entropy(logits, targets, weights=weights, where=where)
    expected = reference_bce(logits, targets, weights, where)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_binary_cross_entropy_keeps_its_digits_at_the_ends():
    logits = np.array([-20.0, 20.0, 0.0], np.float32).reshape(1, 1, 1, 3)
    targets = np.array([0.0, 1.0, 0.25], np.float32).reshape(1, 1, 1, 3)
    loss, gradient = jax.value_and_grad(losses.binary_cross_entropy)(logits, targets)
    expected = (2 * np.log1p(np.exp(-20.0)) + np.log(2)) / 3
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(
        np.ravel(gradient), (sigmoid(np.ravel(logits)) - np.ravel(targets)) / 3, 1e-5
    )


def test_half_precision_logits_are_computed_in_float32():
    logits, targets, _ = draw()
    half = jnp.asarray(logits, jnp.bfloat16)
    for loss in SCALARS.values():
        value = loss(half, targets)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, loss(half.astype(jnp.float32), targets))


class Properties(chex.TestCase):
    """Every loss, with and without jit and on all devices."""

    @chex.all_variants
    @parameterized.parameters(*SCALARS)
    def test_any_input_gives_a_finite_loss_and_gradient(self, name):
        def loss(logits, targets, where):
            return SCALARS[name](logits, targets, where=where)

        compute = self.variant(jax.value_and_grad(loss))

        @settings(max_examples=15, deadline=None)
        @given(LOGITS, TARGETS, WHERE)
        def check(logits, targets, where):
            value, gradient = compute(*map(jnp.asarray, (logits, targets, where)))
            assert np.isfinite(value) and value >= 0
            assert np.isfinite(gradient).all()
            assert not np.asarray(gradient)[~where].any()
            if not where.any():
                assert value == 0

        check()

    @chex.all_variants
    @parameterized.parameters(*SCALARS)
    def test_the_order_of_images_does_not_matter(self, name):
        compute = self.variant(jax.value_and_grad(SCALARS[name]))
        logits, targets, _ = draw()
        order = np.array([2, 0, 1])
        value, gradient = compute(jnp.asarray(logits), jnp.asarray(targets))
        moved = compute(jnp.asarray(logits[order]), jnp.asarray(targets[order]))
        np.testing.assert_allclose(moved[0], value, rtol=1e-6)
        np.testing.assert_allclose(moved[1], np.asarray(gradient)[order], rtol=1e-5)

    @chex.all_variants
    def test_every_variant_agrees_with_the_reference(self):
        logits, targets, _ = draw()
        everywhere = np.ones(SHAPE, bool)
        expected = {
            "paper": reference_focal(logits, targets, 0.0, 1.0, everywhere),
            "plain": reference_focal(logits, targets, 0.0, 0.0, everywhere),
            "strong": reference_focal(logits, targets, 0.5, 4.0, everywhere),
            "binary_cross_entropy": reference_bce(logits, targets, 1.0, everywhere),
        }
        for name, loss in SCALARS.items():
            value = self.variant(loss)(jnp.asarray(logits), jnp.asarray(targets))
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)
