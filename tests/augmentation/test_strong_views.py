"""The strong view against Pillow, its draws, and its independence of neighbors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.augmentation import dropout, strong_views
from tests.support.pillow import (
    PIL_JITTER,
    SIZE,
    assert_levels,
    from_pil,
    pil_strong,
    random_image,
    to_pil,
)
from tests.support.x64 import run_x64

color_jitter = jax.jit(strong_views.color_jitter)
apply_strong = jax.jit(strong_views.apply_strong)
strong_view = jax.jit(strong_views.strong_view)


def unit(images, dtype=jnp.float32):
    return jnp.asarray(images, dtype) / 255


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_jitter_follows_the_order_given(order):
    image = random_image()
    factors = (1.3, 0.7, 1.4, -0.21)
    got = color_jitter(jnp.int16(image), jnp.float32(factors), jnp.int32(order))
    expected = to_pil(image)
    for op in order:
        expected = PIL_JITTER[op](expected, factors[op])
    # A level of difference before the hue may become three after it.
    assert_levels(got, expected, most=3)


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_view_is_pillows(channels):
    beyond, furthest = [], 0
    for seed in range(12):
        image = random_image(seed, channels)
        params = strong_views.draw_strong(jax.random.key(seed))
        got = np.asarray(apply_strong(unit(image), params)) * 255
        np.testing.assert_allclose(got, np.round(got), atol=1e-4)
        expected = from_pil(pil_strong(image, params)).astype(np.int64)
        difference = np.abs(np.round(got).astype(np.int64) - expected)
        beyond.append((difference > 1).mean())
        furthest = max(furthest, difference.max())
    assert max(beyond) <= 1e-3
    assert furthest <= 3


def test_injected_parameters_switch_everything_off():
    image = unit(random_image())
    params = strong_views.StrongParams(
        order=jnp.arange(4),
        factors=jnp.float32([0.5, 1.5, 0.5, 0.25]),
        jitter=jnp.bool_(False),
        grayscale=jnp.bool_(False),
        sigma=jnp.float32(0),
    )
    np.testing.assert_array_equal(apply_strong(image, params), image)
    gray = apply_strong(image, params.replace(grayscale=jnp.bool_(True)))
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    assert not np.array_equal(gray, image)


def test_unrolled_loops_give_the_same_view():
    unrolled = jax.jit(functools.partial(strong_views.apply_strong, unroll=True))
    for seed in range(4):
        image = unit(random_image(seed))
        params = strong_views.draw_strong(jax.random.key(seed))
        params = params.replace(jitter=jnp.bool_(True), sigma=jnp.float32(1.7))
        expected = apply_strong(image, params)
        np.testing.assert_array_equal(unrolled(image, params), expected)


def test_one_channel_takes_brightness_and_contrast_only():
    image = unit(random_image(channels=1))
    params = strong_views.StrongParams(
        order=jnp.int32([3, 0, 2, 1]),
        factors=jnp.float32([1, 1, 0.5, 0.25]),
        jitter=jnp.bool_(True),
        grayscale=jnp.bool_(True),
        sigma=jnp.float32(0),
    )
    np.testing.assert_array_equal(apply_strong(image, params), image)
    darker = params.replace(factors=params.factors.at[0].set(0.5))
    assert float(apply_strong(image, darker).max()) <= 0.5


def test_other_channel_counts_see_no_color_operation():
    rng = np.random.default_rng(3)
    image = unit(rng.integers(0, 256, (*SIZE, 4), np.uint8))
    params = strong_views.draw_strong(jax.random.key(0)).replace(
        factors=jnp.float32([1, 1, 0.5, 0.2]),
        jitter=jnp.bool_(True),
        grayscale=jnp.bool_(True),
        sigma=jnp.float32(0),
    )
    np.testing.assert_array_equal(apply_strong(image, params), image)
    darker = params.replace(factors=jnp.float32([0.5, 1, 1, 0]))
    assert float(apply_strong(image, darker).max()) <= 0.5


def test_draws_have_the_published_frequencies_and_ranges():
    count = 6000
    keys = jax.random.split(jax.random.key(0), count)
    params = jax.tree.map(np.asarray, jax.jit(jax.vmap(strong_views.draw_strong))(keys))

    def assert_share(hits, probability):
        # Five standard deviations of a binomial: fails once in 10^6 right programs.
        deviation = np.sqrt(probability * (1 - probability) / count)
        assert abs(hits.mean() - probability) < 5 * deviation

    assert_share(params.jitter, 0.8)
    assert_share(params.grayscale, 0.2)
    blurred = params.sigma > 0
    assert_share(blurred, 0.5)
    for order in itertools.permutations(range(4)):
        assert_share((params.order == order).all(-1), 1 / 24)
    uniform = {
        (0.5, 1.5): params.factors[:, :3].T,
        (-0.25, 0.25): params.factors[:, 3:].T,
        (0.1, 2.0): [params.sigma[blurred]],
    }
    for (low, high), samples in uniform.items():
        for sample in samples:
            assert low <= sample.min() < sample.max() <= high
            grid = np.linspace(low, high, 20)
            share = (sample[:, None] < grid).mean(0)
            distance = np.abs(share - (grid - low) / (high - low)).max()
            assert distance < 2.7 / np.sqrt(len(sample))
    # Independent decisions: the two coins fall together as often as they should.
    assert_share(params.jitter & blurred, 0.4)
    assert_share(params.grayscale & blurred, 0.1)
    assert abs(np.corrcoef(params.factors.T) - np.eye(4)).max() < 5 / np.sqrt(count)


def test_a_view_depends_on_its_own_key_and_image_alone():
    images = unit(np.stack([random_image(i) for i in range(4)]))
    keys = jax.random.split(jax.random.key(7), 4)
    views = strong_view(keys, images)
    np.testing.assert_array_equal(strong_view(keys, images), views)
    reverse = strong_view(keys[::-1], images[::-1])
    np.testing.assert_array_equal(reverse[::-1], views)
    others = strong_view(keys.at[1:].set(keys[0]), images.at[1:].set(0.5))
    np.testing.assert_array_equal(others[0], views[0])
    same = strong_view(keys, jnp.broadcast_to(images[:1], images.shape))
    for a, b in itertools.combinations(np.asarray(same), 2):
        assert not np.array_equal(a, b)


def test_pmap_and_jit_agree():
    images = unit(np.stack([random_image(i) for i in range(4)]))
    keys = jax.random.split(jax.random.key(3), 4)
    mapped = jax.pmap(strong_views.strong_view)(keys[:, None], images[:, None])[:, 0]
    # Another program may contract multiply and add otherwise: one level at most.
    difference = np.abs(np.asarray(mapped) - np.asarray(strong_view(keys, images)))
    assert difference.max() <= 3 / 255 + 1e-6
    assert (difference > 1e-6).mean() < 1e-3


def test_float64_and_bfloat16_keep_their_type():
    image = random_image()
    params = strong_views.draw_strong(jax.random.key(0))
    narrow = apply_strong(unit(image, jnp.bfloat16), params)
    assert narrow.dtype == jnp.bfloat16
    result = run_x64(X64)
    assert result == {"dtype": "float64", "whole": True, "draws": "float32"}


X64 = """
import json, jax, jax.numpy as jnp, numpy as np
from mpmc_jax.augmentation import strong_views
image = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3)) / 255
keys = jax.random.split(jax.random.key(0), 2)
view = jax.jit(strong_views.strong_view)(keys, jnp.asarray(image))
levels = np.asarray(view) * 255
print(json.dumps({
    "dtype": str(view.dtype),
    "whole": bool(np.abs(levels - np.round(levels)).max() < 1e-12),
    "draws": str(strong_views.draw_strong(keys[0]).factors.dtype),
}))
"""


def test_feature_dropout_keeps_the_mean_and_drops_whole_channels():
    keys = jax.random.split(jax.random.key(0), 8)
    for rate in (0.5, 0.2):
        mask = np.asarray(dropout.feature_dropout_mask(keys, 512, rate=rate))
        assert mask.shape == (8, 1, 1, 512)
        np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
        deviation = np.sqrt(rate * (1 - rate) / mask.size)
        assert abs((mask == 0).mean() - rate) < 5 * deviation
        assert not np.array_equal(mask[0], mask[1])
    again = dropout.feature_dropout_mask(keys[3:4], 512, rate=0.2)
    np.testing.assert_array_equal(again[0], mask[3])
    bfloat = dropout.feature_dropout_mask(keys, 4, dtype=jnp.bfloat16)
    assert bfloat.dtype == jnp.bfloat16
    whole = dropout.feature_dropout_mask(keys, 4, rate=0)
    np.testing.assert_array_equal(whole, 1)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_feature_dropout_refuses_other_rates(rate):
    with pytest.raises(ValueError, match="rate="):
        dropout.feature_dropout_mask(
            jax.random.split(jax.random.key(0), 1), 4, rate=rate
        )
