"""Focal loss, Lovász-softmax and class weights: oracles, properties, over devices."""

import functools

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
WEIGHTS = (0.5, 1.0, 4.0)


def example(seed: int, spread: float = 2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (*SHAPE, CLASSES)).astype(np.float32)
    labels = rng.choice([0, 0, 1, 2, 255], SHAPE)
    labels[1] = np.where(labels[1] == 2, 255, labels[1])  # without one class
    labels[3] = 255
    return logits, labels


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z.astype(float) - z.max())
    return e / e.sum()


def focal_oracle(logits, labels, gamma, weights=(1.0,) * CLASSES) -> float:
    """One pixel at a time, in float64."""
    total, count = 0.0, 0
    for place in np.ndindex(labels.shape):
        if labels[place] < CLASSES:
            p = softmax(logits[place])[labels[place]]
            total -= weights[labels[place]] * (1 - p) ** gamma * np.log(p)
            count += 1
    return total / count


def lovasz_oracle(logits, labels) -> float:
    """The released code's steps, one image and one class at a time, in float64."""
    images = []
    for z, y in zip(logits, labels, strict=True):
        known = y < CLASSES
        of_class = []
        for c in range(CLASSES):
            own = (y[known] == c).astype(float)
            if own.sum() == 0:
                continue
            p = np.array([softmax(each)[c] for each in z[known]])
            error = np.abs(own - p)
            order = np.argsort(-error)
            error, own = error[order], own[order]
            intersection = own.sum() - np.cumsum(own)
            union = own.sum() + np.cumsum(1 - own)
            jaccard = 1 - intersection / union
            jaccard[1:] -= jaccard[:-1].copy()
            of_class.append(error @ jaccard)
        images.append(np.mean(of_class) if of_class else 0.0)
    return float(np.mean(images))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_equals_the_oracle(seed, gamma):
    logits, labels = example(seed)
    found = losses.focal_loss(logits, labels, gamma=gamma)
    np.testing.assert_allclose(found, focal_oracle(logits, labels, gamma), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_lovasz_equals_the_oracle(seed):
    logits, labels = example(seed)
    found = losses.lovasz_softmax(logits, labels)
    np.testing.assert_allclose(found, lovasz_oracle(logits, labels), rtol=1e-5)


@pytest.mark.parametrize("name", ["ce", "focal", "ohem"])
def test_class_weights_multiply_the_pixels_and_not_the_divisor(name):
    logits, labels = example(4)
    loss = SupervisedLoss(name, 2, 0.7, 0, class_weights=WEIGHTS)
    counts = {"supervised": jnp.asarray(np.sum(labels < CLASSES))}
    found = loss(logits, labels, Reduction(None, counts), "supervised")
    gamma = 2.0 if name == "focal" else 0.0
    expected = focal_oracle(logits, labels, gamma, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_computed_by_hand():
    # Probability 3/4 of class 0 in both pixels, which are of class 0 and of class 1.
    logits = jnp.log(jnp.array([[[[3.0, 1.0], [3.0, 1.0]]]]))
    labels = jnp.array([[[0, 1]]])
    p = np.array([0.75, 0.25])
    focal = np.mean(-((1 - p) ** 2) * np.log(p))
    np.testing.assert_allclose(losses.focal_loss(logits, labels), focal, rtol=1e-6)
    # Class 0 has the errors 1/4 (its own pixel) and 3/4 (the other one), class 1 the
    # same. By falling error: the wrong pixel adds 1/2 to the Jaccard loss (1 of 2),
    # and the missed one another 1/2.
    class_0 = 0.75 * 0.5 + 0.25 * 0.5
    # The missed pixel of class 1 comes first: all is lost, the other adds nothing.
    class_1 = 0.75 * 1 + 0.25 * 0
    found = losses.lovasz_softmax(logits, labels)
    np.testing.assert_allclose(found, (class_0 + class_1) / 2, rtol=1e-6)


FUNCTIONS = {
    "focal": functools.partial(losses.focal_loss, gamma=0.5),
    "focal weighted": lambda z, y, **options: losses.focal_loss(
        z, y, weights=losses.value_of_class(y, jnp.asarray(WEIGHTS)), **options
    ),
    "lovasz": losses.lovasz_softmax,
}
GRADIENTS = {name: jax.jit(jax.value_and_grad(f)) for name, f in FUNCTIONS.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 100.0]))
def test_properties(name, seed, spread):
    logits, labels = example(seed, spread)
    value, gradient = GRADIENTS[name](logits, labels)
    chex.assert_tree_all_finite((value, gradient))
    assert value >= 0 and (value <= 1 or name != "lovasz")
    void = labels == 255
    assert not np.any(np.asarray(gradient)[void])
    other = np.where(void[..., None], -logits + 1, logits)
    again, _ = GRADIENTS[name](other, labels)
    assert again == value
    order = np.random.default_rng(seed).permutation(len(labels))
    turned, moved = GRADIENTS[name](logits[order], labels[order])
    np.testing.assert_allclose(turned, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moved, gradient[order], rtol=1e-4, atol=1e-6)
    plain = FUNCTIONS[name](logits, labels)
    np.testing.assert_allclose(plain, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_counts(name):
    logits, labels = example(0)
    value, gradient = GRADIENTS[name](logits, np.full_like(labels, 255))
    assert value == 0 and not np.any(gradient)


def test_the_gradient_of_lovasz_is_its_slope():
    logits, labels = example(2)
    _, gradient = GRADIENTS["lovasz"](logits, labels)
    direction = np.random.default_rng(0).normal(size=logits.shape)
    step = 1e-6 * direction
    slope = lovasz_oracle(logits + step, labels) - lovasz_oracle(logits - step, labels)
    np.testing.assert_allclose(
        np.sum(np.asarray(gradient, float) * direction), slope / 2e-6, rtol=1e-4
    )


def test_large_images_keep_their_precision():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (1, 400, 400, 2)).astype(np.float32)
    labels = (rng.random((1, 400, 400)) < 0.01).astype(int)
    error = np.abs(labels - jax.nn.softmax(logits)[..., 1]).ravel().astype(float)
    order = np.argsort(-error, kind="stable")
    own = labels.ravel()[order]
    jaccard = 1 - (own.sum() - np.cumsum(own)) / (own.sum() + np.cumsum(1 - own))
    expected = error[order] @ np.diff(jaccard, prepend=0)
    # Class 0 is ignored by being void, so that class 1 alone counts.
    both = losses.lovasz_softmax(logits, labels)
    other = losses.lovasz_softmax(logits[..., ::-1], 1 - labels)
    np.testing.assert_allclose(both, other, rtol=1e-6)
    only = 2 * float(both) - _class_0(error[order], own)
    np.testing.assert_allclose(only, expected, rtol=1e-5)


def _class_0(error: np.ndarray, own: np.ndarray) -> float:
    """The term of class 0 of two classes, whose errors are those of class 1."""
    own = 1 - own
    jaccard = 1 - (own.sum() - np.cumsum(own)) / (own.sum() + np.cumsum(1 - own))
    return float(error @ np.diff(jaccard, prepend=0))


ALL = ["ce", "ohem", "focal", "dice", "lovasz", "focal_dice", "ce_lovasz"]


@pytest.mark.parametrize("name", ALL)
def test_devices_and_micro_batches_add_up_to_the_whole(name):
    """Value and gradient of every supervised loss, weighted where it can be."""
    logits, labels = example(5)
    weights = () if name in ("dice", "lovasz") else WEIGHTS
    loss = SupervisedLoss(name, 1, 0.5, 3, class_weights=weights)
    counts = {"supervised": jnp.asarray(np.sum(labels < CLASSES))}

    def total(axis, parts, z, y):
        reduction = Reduction(axis, counts, parts)
        return loss(z, y, reduction, "supervised")

    whole = jax.value_and_grad(functools.partial(total, None, 1))
    value, gradient = jax.jit(whole)(logits, labels)
    chex.assert_tree_all_finite((value, gradient))
    split = [x.reshape((2, 2) + x.shape[1:]) for x in (logits, labels)]
    mapped = jax.pmap(
        jax.value_and_grad(functools.partial(total, "devices", 1)),
        axis_name="devices",
    )
    values, gradients = mapped(*split)
    np.testing.assert_allclose(values, [value] * 2, rtol=1e-5)
    gradients = np.asarray(gradients).reshape(gradient.shape)
    np.testing.assert_allclose(gradients, gradient, rtol=1e-4, atol=1e-7)
    if not {"ohem", "dice"} & set(loss.parts):
        # Their divisors need the predictions of the whole batch.
        micro = jax.jit(functools.partial(total, None, 2))
        summed = sum(float(micro(*part)) for part in zip(*split, strict=True))
        np.testing.assert_allclose(summed, value, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("dice_lovasz", WEIGHTS, "do not act on method.supervised_loss='dice_lovasz'"),
        ("ce", (-1.0, 1.0), "weights must be finite numbers of at least 0"),
        ("ce", (0.0, 0.0), "one of them positive"),
        ("ce_ce", (), "is unknown; valid: .*the mean of two"),
        ("ce", (float("nan"), 1.0), "weights must be finite"),
    ],
)
def test_settings_without_a_meaning_are_refused(name, weights, message):
    with pytest.raises(ValueError, match=message):
        SupervisedLoss(name, 2, 0.7, 0, class_weights=weights)
