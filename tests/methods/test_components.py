"""Components on the device against SciPy's, and U2PL's boxes of half the area."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods.ael import components

label = jax.jit(components.label_components)
draw = jax.jit(components.draw_component_box)


def _spiral(size):
    """One component, as long as the picture allows."""
    mask = np.zeros((size, size), bool)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    while top <= bottom and left <= right:
        mask[top, left : right + 1] = True
        mask[top : bottom + 1, right] = True
        mask[bottom, left : right + 1] = True
        mask[top + 2 : bottom + 1, left] = True
        if top + 2 <= bottom:
            mask[top + 2, left : left + 2] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return mask


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 0.95))
def test_components_are_scipys(seed, density):
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 23)) < density
    found = np.asarray(label(jnp.asarray(mask)))
    expected, count = ndimage.label(mask, np.ones((3, 3)))
    assert ((found > 0) == mask).all()
    pairs = np.unique(np.stack([found[mask], expected[mask]]), axis=1)
    assert pairs.shape[1] == count == len(np.unique(found[mask]))
    for number in np.unique(found[mask]):
        assert np.flatnonzero(found == number).max() == number - 1


@pytest.mark.parametrize("mask", [np.zeros((9, 9), bool), np.ones((9, 9), bool)])
def test_nothing_and_everything(mask):
    found = np.asarray(label(jnp.asarray(mask)))
    np.testing.assert_array_equal(found, 81 * mask)


@pytest.mark.parametrize("kind", ["noise", "spiral", "snake", "all"])
def test_few_rounds_are_enough(kind):
    size = 257
    snake = np.ones((size, size), bool)
    snake[1::4, :-1] = snake[3::4, 1:] = False
    masks = {
        "noise": np.random.default_rng(0).random((size, size)) < 0.45,
        "spiral": _spiral(size),
        "snake": snake,
        "all": np.ones((size, size), bool),
    }
    mask = jnp.asarray(masks[kind])
    number = jnp.where(mask.reshape(-1), jnp.arange(1, mask.size + 1), 0)
    number = jnp.concatenate([jnp.zeros(1, jnp.int32), number])
    fastsv_round, rounds = jax.jit(components.fastsv_round), 0
    while (after := fastsv_round(number, mask)).tolist() != number.tolist():
        number, rounds = after, rounds + 1
    assert 1 <= rounds <= 14
    np.testing.assert_array_equal(number[1:].reshape(mask.shape), label(mask))


def test_a_long_component_is_one():
    mask = _spiral(41)
    _, count = ndimage.label(mask, np.ones((3, 3)))
    assert len(np.unique(np.asarray(label(jnp.asarray(mask)))[mask])) == count


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), least=st.integers(0, 40))
def test_a_box_is_tight_around_a_large_component(seed, least):
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 23)) < 0.35
    numbered, count = ndimage.label(mask, np.ones((3, 3)))
    boxes = {
        (rows.start, columns.start, rows.stop, columns.stop)
        for i, (rows, columns) in enumerate(ndimage.find_objects(numbered), start=1)
        if (numbered == i).sum() > least
    }
    found, box = draw(
        jnp.asarray(mask), jnp.asarray(rng.random(mask.shape, np.float32)), least
    )
    assert bool(found) == bool(boxes)
    assert tuple(map(int, box)) in (boxes or {(0, 0, 0, 0)})


def test_large_components_are_drawn_uniformly():
    mask = np.zeros((9, 30), bool)
    mask[1:4, 1:5] = mask[2:8, 10:20] = mask[5:9, 25:29] = True
    mask[0, 22] = True  # too small
    keys = jax.random.split(jax.random.key(0), 600)
    fields = jax.vmap(lambda key: jax.random.uniform(key, mask.shape))(keys)
    _, boxes = jax.jit(
        jax.vmap(lambda u: components.draw_component_box(jnp.asarray(mask), u, 2))
    )(fields)
    _, counts = np.unique(boxes, axis=0, return_counts=True)
    assert len(counts) == 3
    np.testing.assert_allclose(counts / 600, 1 / 3, atol=0.1)


@pytest.mark.parametrize("size", [65, 513])
def test_u2pls_boxes_cover_half_the_crop(size):
    keys = jax.random.split(jax.random.key(1), 2000)
    top, left, bottom, right = np.asarray(mixing.draw_half_boxes(keys, size)).T
    width, height = right - left, bottom - top
    assert width.min() > size / 2 and width.max() == size - 1
    np.testing.assert_array_equal(height, np.round(size**2 / 2 / width))
    assert top.min() == 0 and left.min() == 0
    assert bottom.max() == size and right.max() == size
    assert abs(width.mean() - (size // 2 + size) / 2) < 0.02 * size
