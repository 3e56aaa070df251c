"""Pillow's own strong view and the images that tests put through it."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

SIZE = (48, 56)


def random_image(seed=0, channels=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*SIZE, channels), np.uint8)


def textured_image(channels=3):
    row, column = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [
        128 + 90 * np.sin(row / (3 + i)) + 40 * np.cos(column / (2 + 2 * i))
        for i in range(channels)
    ]
    return np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8)


def real_image():
    folder = pathlib.Path(os.environ.get("MPMC_TEST_DATA", "/nowhere"))
    paths = sorted((folder / "camvid" / "train").glob("*.*"))
    if not paths:
        pytest.skip("MPMC_TEST_DATA is unset or holds no camvid/train")
    image = np.asarray(Image.open(paths[0]).convert("RGB"))
    return image[100 : 100 + SIZE[0], 200 : 200 + SIZE[1]]


IMAGES = {"random": random_image, "textured": textured_image, "camvid": real_image}


def pil_hue(image, turns):
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(int) + int(turns * 255)) % 256
    hue = Image.fromarray(shifted.astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


PIL_JITTER = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    pil_hue,
)


def to_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pil(image):
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def assert_levels(got, image, most=1, share_beyond_one=1e-3):
    """`got` levels against Pillow's: how far at most, and how often beyond one."""
    difference = np.abs(np.asarray(got, np.int64) - from_pil(image).astype(np.int64))
    assert difference.max() <= most
    assert (difference > 1).mean() <= share_beyond_one


def pil_strong(image, params):
    """Pillow's strong view with the given parameters."""
    out = to_pil(image)
    if params.jitter:
        for op in np.asarray(params.order):
            out = PIL_JITTER[op](out, float(params.factors[op]))
    if params.grayscale and out.mode == "RGB":
        out = out.convert("L").convert("RGB")
    return out.filter(ImageFilter.GaussianBlur(float(params.sigma)))
