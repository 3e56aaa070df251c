import itertools
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from mpmc_jax.models.platform import compiled_for
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.mpmc.lambda_weights import (
    CONFIDENCES,
    PIXEL_SCALES,
    SCALES,
    shuffled_by_class,
)
from mpmc_jax.plugins.mpmc.patches import nearest_patch
from mpmc_jax.plugins.mpmc.plugin import adaptive_weights

FIELD = ReceptiveField(7, 4, 3)
CLASSES = 6
CASES = list(itertools.product(CONFIDENCES, PIXEL_SCALES))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


GAMMA = {
    "softmax_prob": lambda a: softmax(sigmoid(a)),
    "softmax_logit": softmax,
    "sigmoid": sigmoid,
}


def reference(logits, labels, confidence, scale, where=None):
    gamma = GAMMA[confidence](np.asarray(logits, np.float64))
    row = nearest_patch(labels.shape[1], logits.shape[1], FIELD)
    column = nearest_patch(labels.shape[2], logits.shape[2], FIELD)
    weights = np.zeros(labels.shape)
    for i, y, x in np.ndindex(*labels.shape):
        patch, label = gamma[i, row[y], column[x]], labels[i, y, x]
        if label < logits.shape[-1]:
            weights[i, y, x] = patch[label] / (patch.max() if scale == "max" else 1)
    if scale == "mean":
        counted = labels < logits.shape[-1]
        if where is not None:
            counted &= where
        weights /= weights[counted].mean()
    if scale == "class_mean":
        counted = np.ones(labels.shape, bool) if where is None else where
        for c in range(logits.shape[-1]):
            if (counted & (labels == c)).any():
                weights[labels == c] /= weights[counted & (labels == c)].mean()
    return weights, gamma


def draw(seed=0, b=2):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (b, 5, 4, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (b, 17, 13))
    labels[rng.random(labels.shape) < 0.1] = 255
    return logits, labels.astype(np.int32)


@pytest.mark.parametrize("confidence, scale", CASES)
def test_weights_are_the_definition(confidence, scale):
    logits, labels = draw()
    lambda_s, lambda_m = adaptive_weights(
        jnp.asarray(logits),
        jnp.asarray(labels),
        confidence=confidence,
        scale=scale,
        field=FIELD,
    )
    expected_s, expected_m = reference(logits, labels, confidence, scale)
    np.testing.assert_allclose(lambda_s, expected_s, rtol=2e-6)
    np.testing.assert_allclose(lambda_m, expected_m, rtol=2e-6)
    assert not np.asarray(lambda_s)[labels == 255].any()


@pytest.mark.parametrize("classes", [4, 21])
def test_the_papers_confidence_is_nearly_flat(classes):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 9, (1, 5, 4, classes)))
    labels = jnp.zeros((1, 17, 13), jnp.int32)
    _, gamma = adaptive_weights(logits, labels, confidence="softmax_prob", scale="none")
    # One probability against the others', all within [0, 1] (row D4 of
    # docs/deviations.md).
    assert gamma.min() >= 1 / (1 + (classes - 1) * np.e)
    assert gamma.max() <= np.e / (np.e + classes - 1)


@pytest.mark.parametrize("scale", SCALES)
def test_patch_weights_are_scaled_alike(scale):
    """D26: over the valid patches and all classes."""
    logits, labels = draw()
    valid = np.random.default_rng(2).random(logits.shape[:3]) < 0.6
    _, lambda_m = adaptive_weights(
        jnp.asarray(logits),
        jnp.asarray(labels),
        confidence="softmax_prob",
        scale="none",
        patch_scale=scale,
        field=FIELD,
        valid=jnp.asarray(valid),
    )
    gamma = GAMMA["softmax_prob"](logits.astype(np.float64))
    divisor = {
        "none": 1,
        "max": gamma.max(-1, keepdims=True),
        "mean": gamma[valid].mean(),
    }
    np.testing.assert_allclose(lambda_m, gamma / divisor[scale], rtol=2e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shuffling_permutes_the_weights_of_each_class_of_each_image(seed):
    rng = np.random.default_rng(seed)
    weights = rng.random((2, 6, 7)).astype(np.float32)
    classes = rng.integers(-1, 3, weights.shape)
    found = np.asarray(shuffled_by_class(jnp.asarray(weights), jnp.asarray(classes)))
    for image, label in itertools.product(range(2), range(-1, 3)):
        where = classes[image] == label
        np.testing.assert_array_equal(
            np.sort(found[image][where]), np.sort(weights[image][where])
        )
    alone = shuffled_by_class(jnp.asarray(weights[1:]), jnp.asarray(classes[1:]))
    np.testing.assert_array_equal(alone[0], found[1])


def test_shuffling_moves_nearly_all_pixels():
    weights = jnp.arange(40 * 40.0).reshape(1, 40, 40)
    found = shuffled_by_class(weights, jnp.zeros((1, 40, 40), jnp.int32))
    assert (found != weights).mean() > 0.99


@pytest.mark.parametrize("scale", ["mean", "class_mean"])
def test_mean_scale_counts_the_named_pixels(scale):
    logits, labels = draw()
    where = np.random.default_rng(1).random(labels.shape) < 0.3
    lambda_s, _ = adaptive_weights(
        jnp.asarray(logits),
        jnp.asarray(labels),
        confidence="softmax_prob",
        scale=scale,
        field=FIELD,
        where=jnp.asarray(where),
    )
    expected, _ = reference(logits, labels, "softmax_prob", scale, where)
    np.testing.assert_allclose(lambda_s, expected, rtol=2e-6)
    counted = where & (labels != 255)
    np.testing.assert_allclose(np.asarray(lambda_s)[counted].mean(), 1, rtol=1e-6)


@pytest.mark.parametrize("scale", ["mean", "class_mean"])
def test_mean_scale_is_that_of_all_devices(scale):
    devices = jax.local_device_count()
    logits, labels = draw(b=devices)
    labels[0, 3:] = 255
    arguments = {"confidence": "sigmoid", "scale": scale, "field": FIELD}
    total = partial(jax.lax.psum, axis_name="device")
    spread = jax.pmap(
        partial(adaptive_weights, **arguments, global_sum=total), axis_name="device"
    )
    parts = spread(jnp.asarray(logits)[:, None], jnp.asarray(labels)[:, None])
    whole = adaptive_weights(jnp.asarray(logits), jnp.asarray(labels), **arguments)
    for part, one in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part[:, 0], one, rtol=1e-6)


@pytest.mark.parametrize("confidence, scale", CASES)
def test_any_logits_and_labels_give_finite_weights(confidence, scale):
    compute = jax.jit(partial(adaptive_weights, confidence=confidence, scale=scale))

    @settings(max_examples=15, deadline=None)
    @given(
        hnp.arrays(np.float32, (1, 2, 3, 3), elements=st.floats(-1e4, 1e4, width=32)),
        hnp.arrays(np.uint8, (1, 7, 9)) | st.just(np.full((1, 7, 9), 255, np.uint8)),
    )
    def check(logits, labels):
        for weights in compute(jnp.asarray(logits), jnp.asarray(labels)):
            assert np.isfinite(weights).all()
            assert (np.asarray(weights) >= 0).all()

    check()


def test_gpus_look_up_the_same_weights():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    labels = jnp.asarray(rng.choice([*range(5), 255], (2, 10, 13)), jnp.int32)

    def weights():
        return adaptive_weights(logits, labels, confidence="sigmoid", scale="none")[0]

    expected = weights()
    with compiled_for("gpu"):
        np.testing.assert_array_equal(weights(), expected)


def test_no_gradient_flows():
    logits, labels = draw()

    def weight(logits):
        lambda_s, lambda_m = adaptive_weights(
            logits, jnp.asarray(labels), confidence="softmax_logit", scale="mean"
        )
        return lambda_s.sum() + lambda_m.sum()

    assert not jax.grad(weight)(jnp.asarray(logits)).any()


def test_unknown_names_list_the_valid_ones():
    logits, labels = map(jnp.asarray, draw())
    with pytest.raises(ValueError, match="softmax_prob, softmax_logit, sigmoid"):
        adaptive_weights(logits, labels, confidence="entropy", scale="none")
    with pytest.raises(ValueError, match="none, max, mean"):
        adaptive_weights(logits, labels, confidence="sigmoid", scale="sum")
