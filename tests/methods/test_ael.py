"""AEL's pieces against the numbers of its release, and against slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.losses import pixel_cross_entropy
from mpmc_jax.methods.ael import confidence as ael_confidence
from tests.support import golden


def consistency(logits, label, confidence, gamma):
    survives = jnp.ones(label.shape, bool)
    weight = ael_confidence.consistency_weights(confidence, survives, gamma)
    total = jnp.sum(weight * pixel_cross_entropy(logits, label))
    return total / (jnp.sum(weight) + 1e-12)


def test_consistency_and_confidence_are_the_released_ones():
    cases = 0
    for path in golden.golden_files("ael_consistency*.npz"):
        arrays = np.load(path)
        logits = jnp.asarray(np.moveaxis(arrays["student_logits"], 1, -1))
        value, gradient = jax.value_and_grad(consistency)(
            logits,
            jnp.asarray(arrays["pseudo_labels"]),
            jnp.asarray(arrays["confidence"], jnp.float32),
            float(arrays["gamma"]),
        )
        np.testing.assert_allclose(value, arrays["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            np.linalg.norm(gradient), arrays["grad_norm"], rtol=1e-5
        )
        found = ael_confidence.class_confidence(logits, jnp.asarray(arrays["labels"]))
        np.testing.assert_allclose(found, arrays["category_confidence"], rtol=1e-5)
        cases += 1
    assert cases


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_confidence_and_survivors_are_the_oracles(seed):
    rng = np.random.default_rng(seed)
    classes, shape = 4, (2, 3, 5)
    logits = rng.normal(0, 3, (*shape, classes)).astype(np.float32)
    label = np.where(rng.random(shape) < 0.3, 255, rng.integers(0, 3, shape))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [
        p[label == c, c].mean() if (label == c).any() else 0.0 for c in range(classes)
    ]
    found = ael_confidence.class_confidence(jnp.asarray(logits), jnp.asarray(label))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found[3] == 0  # a class that never occurs
    confidence = rng.random(classes).astype(np.float32)
    uniform = rng.random((classes, *shape[1:])).astype(np.float32)
    kept = ael_confidence.survivors(
        jnp.asarray(logits), jnp.asarray(confidence), jnp.asarray(uniform)
    )
    lack = 1 - confidence
    for b, i, j in np.ndindex(*shape):
        c = logits[b, i, j].argmax()
        limit = 1 - lack[c] / (lack.max() + 1e-12)
        if abs(uniform[c, i, j] - limit) > 1e-6:
            assert kept[b, i, j] == (uniform[c, i, j] > limit)
    least = logits.argmax(-1) == confidence.argmin()
    assert np.asarray(kept)[least & (uniform[confidence.argmin()] > 0)[None]].all()


def test_confidence_moves_by_a_thousandth_and_certainty_keeps_nothing():
    found = ael_confidence.updated(jnp.asarray([0.5, 1.0]), jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(found, [0.5005, 0.999], rtol=1e-6)
    logits, uniform = jnp.zeros((1, 2, 2, 3)), jnp.full((3, 2, 2), 0.5)
    kept = ael_confidence.survivors(logits, jnp.ones(3), uniform)
    assert not kept.any()
    weight = ael_confidence.consistency_weights(jnp.full((1, 2, 2), 0.5), kept)
    assert not weight.any()
