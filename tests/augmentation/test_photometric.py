"""Every photometric operation against Pillow's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ImageFilter

from mpmc_jax.augmentation import photometric, strong_views
from tests.support.pillow import (
    IMAGES,
    PIL_JITTER,
    SIZE,
    assert_levels,
    pil_hue,
    to_pil,
)

JITTER = tuple(
    jax.jit(op)
    for op in (
        photometric.adjust_brightness,
        photometric.adjust_contrast,
        photometric.adjust_saturation,
        photometric.adjust_hue,
    )
)
gaussian_blur = jax.jit(photometric.gaussian_blur)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("op", range(4))
def test_each_jitter_operation_is_pillows(op, name):
    image = IMAGES[name]()
    values = (
        (-0.25, -0.07, 0.0, 0.13, 0.25) if op == strong_views.HUE else (0.5, 0.77, 1.46)
    )
    for value in values:
        got = JITTER[op](jnp.float32(image), jnp.float32(value))
        assert_levels(got, PIL_JITTER[op](to_pil(image), value))


@pytest.mark.parametrize("name", IMAGES)
def test_grayscale_is_pillows(name):
    image = IMAGES[name]()
    expected = to_pil(image).convert("L").convert("RGB")
    assert_levels(photometric.grayscale(jnp.float32(image)), expected, most=0)


@pytest.mark.parametrize("name", IMAGES)
def test_blur_is_pillows(name):
    image = IMAGES[name]()
    for sigma in (0.0, 0.1, 0.37, 0.9, 1.21, 1.63, 1.99, 2.4):
        got = gaussian_blur(jnp.float32(image), jnp.float32(sigma))
        expected = to_pil(image).filter(ImageFilter.GaussianBlur(sigma))
        assert_levels(got, expected, most=2)


def test_blur_of_a_constant_and_of_a_step():
    flat = jnp.full((*SIZE, 3), 201.0)
    np.testing.assert_array_equal(gaussian_blur(flat, jnp.float32(1.7)), flat)
    column = np.arange(SIZE[1])
    step = jnp.where(jnp.asarray(column)[None, :, None] < 28, 0.0, 240.0)
    blurred = gaussian_blur(jnp.broadcast_to(step, flat.shape), jnp.float32(1.5))
    normal = [0.5 * (1 + math.erf((x - 27.5) / 1.5 / math.sqrt(2))) for x in column]
    response = np.broadcast_to(240 * np.array(normal)[None, :, None], flat.shape)
    np.testing.assert_allclose(blurred, response, atol=2)


@pytest.mark.full
def test_hue_is_pillows_on_every_color():
    axes = np.meshgrid(*[np.arange(256)] * 3, indexing="ij")
    colors = np.stack(axes, -1).astype(np.uint8).reshape(16, 256, 4096, 3)
    for part in colors:
        got = JITTER[strong_views.HUE](jnp.float32(part), jnp.float32(0.1))
        assert_levels(got, pil_hue(to_pil(part), 0.1), most=1)
