"""CutMix boxes, masks, pasting, partners, and pseudo-labels."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import pseudo_labels
from tests.support.x64 import run_x64

SIZE = 64
DRAWS = 6000


def reference_boxes(rng, count, size):
    """UniMatch's rejection sampler in NumPy, boxes only."""
    boxes = []
    for _ in range(count):
        area = rng.uniform(0.02, 0.4) * size**2
        while True:
            ratio = rng.uniform(0.3, 1 / 0.3)
            width, height = int(np.sqrt(area / ratio)), int(np.sqrt(area * ratio))
            left, top = rng.integers(0, size, 2)
            if left + width <= size and top + height <= size:
                boxes.append((top, left, top + height, left + width))
                break
    return np.array(boxes)


@pytest.fixture(scope="module")
def boxes():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return np.asarray(jax.jit(mixing.draw_boxes, static_argnums=1)(keys, SIZE))


def test_half_of_the_boxes_are_empty_and_the_rest_lie_inside(boxes):
    assert boxes.shape == (DRAWS, 4)
    assert boxes.dtype == np.int32
    empty = (boxes == 0).all(-1)
    assert abs(empty.mean() - 0.5) < 5 * 0.5 / np.sqrt(DRAWS)
    top, left, bottom, right = boxes[~empty].T
    assert top.min() >= 0 and left.min() >= 0
    assert bottom.max() <= SIZE and right.max() <= SIZE
    height, width = bottom - top, right - left
    # Floors take less than one pixel from each side.
    assert (height * width <= 0.4 * SIZE**2).all()
    assert ((height + 1) * (width + 1) > 0.02 * SIZE**2).all()
    assert ((height + 1) / width > 0.3).all() and (height / (width + 1) < 1 / 0.3).all()


def test_boxes_are_distributed_as_by_rejection(boxes):
    drawn = boxes[(boxes != 0).any(-1)]
    expected = reference_boxes(np.random.default_rng(0), DRAWS, SIZE)

    def features(boxes):
        top, left, bottom, right = boxes.T
        height, width = bottom - top, right - left
        return np.stack([top, left, height, width, height * width, top - left])

    # Two-sample Kolmogorov-Smirnov at 10^-6 (ties make it stricter, not laxer).
    n, m = len(drawn), len(expected)
    bound = np.sqrt(-np.log(1e-6 / 2) / 2 * (n + m) / (n * m))
    for a, b in zip(features(drawn), features(expected), strict=True):
        grid = np.unique(np.concatenate([a, b]))
        cumulative = [
            np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (a, b)
        ]
        assert np.abs(cumulative[0] - cumulative[1]).max() < bound


def test_the_stated_failure_probability_holds():
    area, ratio = 0.4, np.linspace(0.3, 1 / 0.3, 200001)
    inside = np.clip(1 - np.sqrt(area / ratio), 0, 1)
    inside *= np.clip(1 - np.sqrt(area * ratio), 0, 1)
    assert inside.mean() > 0.0593
    assert (1 - inside.mean()) ** mixing._CANDIDATES < 1e-13


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([1, 2, 17, 321]))
def test_a_box_lies_inside_any_crop_and_repeats(seed, size):
    key = jax.random.key(seed)
    box = np.asarray(mixing.draw_box(key, size))
    np.testing.assert_array_equal(mixing.draw_box(key, size), box)
    assert 0 <= box[0] <= box[2] <= size
    assert 0 <= box[1] <= box[3] <= size
    # There is a box in half of the cases; one of a small crop may have no pixel.
    is_box = box[2] > box[0] and box[3] > box[1]
    assert is_box or size < 17 or not box.any()


def test_a_box_depends_on_its_own_key_alone(boxes):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    np.testing.assert_array_equal(mixing.draw_boxes(keys[5:7], SIZE), boxes[5:7])
    assert len(np.unique(boxes, axis=0)) > DRAWS * 0.45
    mapped = jax.pmap(lambda key: mixing.draw_boxes(key, SIZE))(keys[:4, None])
    np.testing.assert_array_equal(mapped[:, 0], boxes[:4])


RECTANGLES = np.array(
    [[0, 0, 0, 0], [1, 2, 4, 3], [0, 0, 5, 7], [3, 3, 2, 7]], np.int32
)


@pytest.mark.parametrize("function", [mixing.box_mask, mixing.extent_mask])
def test_masks_are_rectangles(function):
    mask = function(jnp.asarray(RECTANGLES), 5, 7)
    expected = np.zeros((4, 5, 7), bool)
    for i, (top, left, bottom, right) in enumerate(RECTANGLES):
        expected[i, top:bottom, left:right] = True
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("tail", [(), (3,), (1,)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, bool])
def test_paste_is_where(tail, dtype):
    rng = np.random.default_rng(0)
    mask = rng.random((4, 5, 7)) < 0.5
    inside, outside = rng.integers(0, 2, (2, 4, 5, 7, *tail)).astype(dtype)
    got = jax.jit(mixing.paste)(mask, inside, outside)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[mask], inside[mask])
    np.testing.assert_array_equal(got[~mask], outside[~mask])


def test_paste_refuses_shapes_that_would_broadcast():
    mask = jnp.ones((2, 5, 7), bool)
    with pytest.raises(ValueError, match="cannot paste"):
        mixing.paste(mask, jnp.zeros((2, 5, 7, 3)), jnp.zeros((2, 5, 7, 1)))
    with pytest.raises(ValueError, match="cannot paste"):
        mixing.paste(mask, jnp.zeros((5, 7, 3)), jnp.zeros((5, 7, 3)))


def test_partners_stay_within_their_group():
    tree = {"a": jnp.arange(6), "b": jnp.arange(12).reshape(6, 2)}
    rolled = mixing.roll_in_groups(tree, 3)
    np.testing.assert_array_equal(rolled["a"], [1, 2, 0, 4, 5, 3])
    np.testing.assert_array_equal(
        rolled["b"], np.asarray(tree["b"])[[1, 2, 0, 4, 5, 3]]
    )
    np.testing.assert_array_equal(mixing.roll_in_groups(tree["a"], 1), tree["a"])
    with pytest.raises(ValueError, match="groups of 4"):
        mixing.roll_in_groups(tree, 4)


def test_partners_do_not_depend_on_the_device_count():
    x = jnp.arange(16)
    whole = mixing.roll_in_groups(x, 2)
    split = jax.pmap(lambda x: mixing.roll_in_groups(x, 2))(x.reshape(4, 4))
    np.testing.assert_array_equal(split.reshape(-1), whole)


def reference_softmax(logits):
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_confidence_and_label_are_those_of_the_softmax(scale):
    logits = scale * np.random.default_rng(0).standard_normal((2, 5, 7, 6), np.float32)
    confidence, label = jax.jit(pseudo_labels.confidence_and_label)(logits)
    assert confidence.dtype == jnp.float32 and label.dtype == jnp.int32
    expected = reference_softmax(logits).max(-1)
    np.testing.assert_allclose(confidence, expected, rtol=2e-6)
    np.testing.assert_array_equal(label, logits.argmax(-1))


def test_ties_take_the_first_class_and_no_gradient_flows():
    confidence, label = pseudo_labels.confidence_and_label(jnp.zeros((1, 2, 2, 5)))
    np.testing.assert_array_equal(label, 0)
    np.testing.assert_allclose(confidence, 0.2, rtol=1e-6)
    logits = jnp.arange(5.0).reshape(1, 1, 1, 5)

    def total(logits):
        return pseudo_labels.confidence_and_label(logits)[0].sum() + logits.sum()

    np.testing.assert_array_equal(jax.grad(total)(logits), 1)


def test_bfloat16_scores_get_a_float32_confidence():
    logits = jnp.zeros((1, 1, 1, 200), jnp.bfloat16)
    confidence, _ = pseudo_labels.confidence_and_label(logits)
    assert confidence.dtype == jnp.float32
    np.testing.assert_allclose(confidence, 1 / 200, rtol=1e-6)


def test_float64():
    result = run_x64(X64)
    assert result["error"] < 1e-14
    assert result["dtypes"] == ["float64", "int32", "int32"]


X64 = """
import json, jax, jax.numpy as jnp, numpy as np
from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import pseudo_labels
z = np.random.default_rng(0).standard_normal((2, 3, 4, 5)) * 8
confidence, label = pseudo_labels.confidence_and_label(jnp.asarray(z))
p = np.exp(z - z.max(-1, keepdims=True))
boxes = mixing.draw_boxes(jax.random.split(jax.random.key(0), 3), 32)
error = np.abs(np.asarray(confidence) - (p / p.sum(-1, keepdims=True)).max(-1)).max()
dtypes = [str(x.dtype) for x in (confidence, label, boxes)]
print(json.dumps({"error": float(error), "dtypes": dtypes}))
"""
