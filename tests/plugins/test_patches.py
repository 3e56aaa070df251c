import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.mpmc import patches
from mpmc_jax.plugins.mpmc import plugin as mpmc
from tests.support.golden import golden_files

LAYER1 = ReceptiveField(39, 4, 19)
UNET = ReceptiveField(32, 4, 14)
TOKEN = ReceptiveField(16, 16, 0)
# As DPT's fused maps on patches of 14 pixels: eight positions per patch.
FUSED = ReceptiveField(9, Fraction(7, 4), 3)


def window(index, side, field):
    """The pixels of one axis that patch `index` covers."""
    start = math.floor(index * field.stride) - field.padding
    return slice(max(start, 0), max(min(start + field.size, side), 0))


def reference_targets(labels, num_classes, field, size):
    b, height, width = labels.shape
    out = np.zeros((b, *size, num_classes), bool)
    for i, row, column in np.ndindex(b, *size):
        rows, columns = window(row, height, field), window(column, width, field)
        for label in np.unique(labels[i, rows, columns]):
            if 0 <= label < num_classes:
                out[i, row, column, label] = True
    return out


def draw(shape, num_classes, seed=0):
    """Blocky labels, so that patches lack most classes, with void and one bad value."""
    rng = np.random.default_rng(seed)
    b, height, width = shape
    coarse = rng.integers(0, num_classes, (b, height // 9 + 1, width // 9 + 1))
    coarse[rng.random(coarse.shape) < 0.2] = 255
    coarse[rng.random(coarse.shape) < 0.1] = num_classes
    fine = coarse.repeat(9, axis=1).repeat(9, axis=2)
    return fine[:, :height, :width].astype(np.uint8)


@pytest.mark.parametrize("num_classes", [1, 7, 32, 33, 40, 64, 150])
def test_targets_over_any_number_of_words(num_classes):
    labels = draw((2, 45, 62), num_classes)
    labels[0, :44, :44] = 255
    targets, valid = mpmc.patch_targets(jnp.asarray(labels), num_classes, LAYER1)
    expected = reference_targets(labels, num_classes, LAYER1, (12, 16))
    assert targets.dtype == valid.dtype == bool
    np.testing.assert_array_equal(targets, expected)
    np.testing.assert_array_equal(valid, expected.any(-1))
    assert not valid.all()


# ViT tokens over a side that is no multiple of 16 leave the last pixels unseen.
@pytest.mark.parametrize(
    "field",
    [LAYER1, UNET, TOKEN, FUSED, ReceptiveField(3, 5, 1), ReceptiveField(99, 8, 45)],
)
def test_targets_of_any_receptive_field(field):
    labels = draw((1, 52, 71), 5)
    targets, _ = mpmc.patch_targets(jnp.asarray(labels), 5, field)
    size = patches.tap_size((52, 71), field)
    np.testing.assert_array_equal(targets, reference_targets(labels, 5, field, size))


def test_a_map_larger_than_its_layers_rounded_down():
    labels = draw((1, 40, 40), 5)
    size = (11, 11)  # AugSeg's ceil-mode pooling: 800 gives 201, not 200
    targets, _ = mpmc.patch_targets(jnp.asarray(labels), 5, LAYER1, size=size)
    np.testing.assert_array_equal(targets, reference_targets(labels, 5, LAYER1, size))
    assert patches.tap_size((40, 40), LAYER1) == (10, 10)


@pytest.mark.parametrize(
    "side, count", [(321, 81), (513, 129), (801, 201), (97, 25), (129, 33), (320, 80)]
)
def test_tap_sizes_are_the_published_networks(side, count):
    assert patches.tap_size((side, side), LAYER1) == (count, count)


def test_golden_patch_targets():
    for path in golden_files("patch_targets_*.npz"):
        golden = np.load(path)
        labels = jnp.asarray(golden["labels"])
        expected = golden["targets"].transpose(0, 2, 3, 1)
        targets, valid = mpmc.patch_targets(labels, expected.shape[-1], LAYER1)
        np.testing.assert_array_equal(targets, expected)
        np.testing.assert_array_equal(valid, expected.any(-1))


def test_a_patch_is_valid_with_one_real_pixel():
    real = np.zeros((1, 97, 97), bool)
    real[0, 50, 20] = True
    valid = mpmc.real_patches(jnp.asarray(real), LAYER1)
    expected = reference_targets(np.where(real, 0, 255), 1, LAYER1, (25, 25))[..., 0]
    np.testing.assert_array_equal(valid, expected)
    assert valid.sum() == 10 * 9
    assert not mpmc.real_patches(jnp.zeros((1, 97, 97), bool), LAYER1).any()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2),
    st.data(),
)
def test_nearest_patch_is_nearest(count, size, stride, trim, data):
    padding = data.draw(st.integers(0, size))
    field = ReceptiveField(size, stride, padding)
    side = max(count * stride - trim, 1)
    chosen = patches.nearest_patch(side, count, field)
    center = [i * stride - padding + (size - 1) / 2 for i in range(count)]
    for pixel, patch in enumerate(chosen):
        distance = [abs(pixel - c) for c in center]
        assert distance[patch] == min(distance)
        assert min(distance) not in distance[:patch]


def test_nearest_patch_of_a_stride_that_is_no_whole_number():
    chosen = patches.nearest_patch(14, 8, FUSED)
    centers = [1 + 1.75 * i for i in range(8)]
    expected = [int(np.argmin([abs(x - c) for c in centers])) for x in range(14)]
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("side, count", [(321, 81), (320, 80), (801, 201), (97, 25)])
def test_without_a_field_patches_are_those_of_layer1(side, count):
    np.testing.assert_array_equal(
        patches.nearest_patch(side, count), patches.nearest_patch(side, count, LAYER1)
    )


@pytest.mark.parametrize("field", [UNET, TOKEN])
def test_a_centered_tiling_gives_each_patch_its_own_square(field):
    chosen = patches.nearest_patch(64, 64 // field.stride, field)
    np.testing.assert_array_equal(chosen, np.arange(64) // field.stride)


def test_targets_are_the_same_under_jit_and_pmap():
    devices = jax.local_device_count()
    labels = jnp.asarray(draw((devices, 33, 33), 40))

    def compute(labels):
        return mpmc.patch_targets(labels, 40, LAYER1)

    eager = compute(labels)
    jitted = jax.jit(compute)(labels)
    spread = jax.pmap(compute)(labels[:, None])
    for one, two, three in zip(eager, jitted, spread, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three[:, 0])
