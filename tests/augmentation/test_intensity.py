"""AugSeg's operations, draws, mixing and targets against slow and obvious code."""

import os
import pathlib

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mpmc_jax.augmentation import mixing, strong_views
from mpmc_jax.methods import pseudo_labels
from tests.support.pillow import from_pil, pil_hue, random_image, textured_image, to_pil

PILLOW = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "blur": lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "posterize": lambda image, bits: ImageOps.posterize(image, int(bits)),
    "solarize": lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    "hue": pil_hue,
}
PILLOW_COLOR = ("saturation", "hue")  # nothing to a gray image
NAMES = tuple(strong_views.INTENSITY)
DRAWS = 4000


def _strength(name, rng):
    """What the specification lets an operation's strength be."""
    if name == "posterize":
        return float(rng.integers(4, 8))
    if name == "solarize":
        return float(rng.integers(1, 256))
    if name == "hue":
        return rng.uniform(0, 0.5) * rng.choice([-1, 1])
    return rng.uniform(0.1, 2.0) if name == "blur" else rng.uniform(0.05, 0.95)


def _photographs(folder):
    """CamVid's, every fourth one in gray."""
    paths = sorted(folder.glob("camvid/train/*.jpg"))[:40:3]
    for i, path in enumerate(paths):
        with Image.open(path) as picture:
            yield from_pil(picture.convert("L" if i % 4 == 3 else "RGB"))


def _slices(folder):
    """ACDC's, as gray levels."""
    for path in sorted(folder.glob("acdc/data/slices/*.h5"))[:40:3]:
        with h5py.File(path) as file:
            yield (np.asarray(file["image"]) * 255).astype(np.uint8)[..., None]


KINDS = {"camvid": _photographs, "acdc": _slices}


def _crops(kind, count, size=65):
    """Crops of real images, or made ones where there are none."""
    folder = pathlib.Path(os.environ.get("MPMC_TEST_DATA", "/nowhere"))
    images = list(KINDS[kind](folder))
    assert images or not folder.is_dir(), f"no images of {kind} in {folder}"
    if not images:
        return [random_image(0), textured_image(), random_image(1, 1)] * (count // 3)
    rng, crops = np.random.default_rng(0), []
    for i in range(count):
        image = images[i % len(images)]
        top, left = (rng.integers(0, side - size) for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return crops


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "draws", [24, pytest.param(200, marks=pytest.mark.full)], ids=str
)
def test_an_operation_is_pillows(name, kind, draws):
    """99.9 % of values within one level, none beyond three, the blur's within two."""
    operation = jax.jit(strong_views.INTENSITY[name])
    rng, far, values, furthest = np.random.default_rng(1), 0, 0, 0
    for image in _crops(kind, draws):
        strength = np.float32(_strength(name, rng))
        got = operation(jnp.float32(image), jnp.float32(strength))
        expected = from_pil(PILLOW[name](to_pil(image), float(strength)))
        difference = np.abs(np.asarray(got).astype(int) - expected.astype(int))
        far += (difference > 1).sum()
        values += difference.size
        furthest = max(furthest, difference.max())
    assert far / values <= 1e-3
    assert furthest <= (2 if name == "blur" else 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_image_survives_every_operation(channels):
    flat = jnp.full((5, 6, channels), 77.0)
    for name in ("autocontrast", "equalize", "sharpness", "identity"):
        np.testing.assert_array_equal(strong_views.INTENSITY[name](flat, 0.5), flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_drawn_as_published(channels):
    keys = jax.random.split(jax.random.key(3), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: strong_views.draw_intensity(key, channels)))
    operation, strength = (np.asarray(x) for x in jax.tree.leaves(draw(keys)))
    pool = [i for i, n in enumerate(NAMES) if channels == 3 or n not in PILLOW_COLOR]
    # The first acts always, the second two times of three, the third once of three.
    idle = (operation == 0).mean(0)
    share = 1 / len(pool)
    expected = np.array([share, 1 / 3 + 2 / 3 * share, 2 / 3 + share / 3])
    np.testing.assert_allclose(idle, expected, atol=5 * np.sqrt(0.25 / DRAWS))
    counts = np.bincount(operation[:, 0], minlength=len(NAMES))
    assert (np.flatnonzero(counts) == pool).all()
    np.testing.assert_allclose(counts[pool] / DRAWS, share, atol=0.03)
    for name in PILLOW:
        drawn = strength[operation == NAMES.index(name)]
        if name in ("contrast", "brightness", "saturation", "sharpness"):
            assert ((drawn > 0.05 - 1e-6) & (drawn <= 0.95)).all()
        elif name == "posterize":
            assert set(drawn) == {4, 5, 6, 7}
        elif name == "solarize":
            assert (drawn == np.round(drawn)).all()
            assert drawn.min() >= 1 and drawn.max() <= 255
        elif name == "hue":
            assert (np.abs(drawn) <= 0.5).all()
        elif name == "blur":
            assert ((drawn >= 0.1) & (drawn <= 2.0)).all()


def test_an_images_view_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    images = jnp.stack([jnp.float32(random_image(i)) / 255 for i in range(4)])
    view = jax.jit(strong_views.intensity_view)
    whole = view(keys, images)
    np.testing.assert_array_equal(view(keys[2:], images[2:]), whole[2:])
    assert whole.shape == images.shape and whole.dtype == images.dtype
    np.testing.assert_allclose(whole * 255, jnp.round(whole * 255), atol=1e-4)


def test_squares_have_one_size_a_group_and_published_areas():
    groups, members, size = 600, 3, 80
    group_keys = jax.random.split(jax.random.key(1), groups)
    keys = jax.random.split(jax.random.key(2), groups * members)
    for beta in ((8.0, 2.0), (4.0, 4.0)):
        boxes = np.asarray(mixing.draw_squares(group_keys, keys, size, beta=beta))
        top, left, bottom, right = boxes.T
        assert boxes.min() >= 0 and boxes.max() <= size
        sides = np.stack([bottom - top, right - left])
        whole = (top > 0) & (left > 0) & (bottom < size) & (right < size)
        assert (sides[0] == sides[1])[whole].all() and (sides[0][whole] % 2 == 0).all()
        grouped = np.where(whole, sides[0], -1).reshape(groups, members)
        most = grouped.max(1, keepdims=True)
        assert ((grouped == most) | (grouped == -1)).all()
        # Of boxes whose center is far from the border none is cut: their mean area is
        # that of all, E[1 - lambda] = b / (a + b), less the rounding down.
        share = (np.maximum(sides[0], sides[1]) ** 2).mean() / size**2
        assert 0.6 * beta[1] / sum(beta) < share < beta[1] / sum(beta)
        centers = (top + bottom)[whole] / 2
        assert centers.min() >= size // 8 and centers.max() <= size - 1


def test_a_permutation_stays_within_its_group():
    orders = mixing.draw_orders(jax.random.split(jax.random.key(0), 50), 4)
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    assert len(np.unique(orders, axis=0)) > 15
    values = np.arange(200)
    got = np.asarray(mixing.permute_in_groups(jnp.asarray(values), orders))
    for group, order in enumerate(np.asarray(orders)):
        np.testing.assert_array_equal(
            got[4 * group : 4 * group + 4], 4 * group + np.asarray(order)
        )


@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=20)
def test_image_confidence_is_the_papers(seed, shift):
    logits = np.random.default_rng(seed).normal(0, 3, (2, 3, 4, 5))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = -(p * np.log(p + 1e-10)).sum(-1)
    expected = (p.max(-1) * (1 - entropy / np.log(5))).mean((1, 2))
    got = pseudo_labels.image_confidence(jnp.float32(logits + shift))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_image_confidence_of_certainty_and_of_none():
    sure = jnp.zeros((1, 2, 2, 3)).at[..., 1].set(1e4)
    np.testing.assert_allclose(pseudo_labels.image_confidence(sure), [1.0], atol=1e-6)
    unsure = pseudo_labels.image_confidence(jnp.zeros((1, 2, 2, 3)))
    np.testing.assert_allclose(unsure, [0.0], atol=1e-6)


def test_a_single_class_is_certain():
    found = pseudo_labels.image_confidence(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(found, [1.0])
