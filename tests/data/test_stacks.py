"""TIFF files of several pages: images of their own, or channels of one image."""

import contextlib

import numpy as np
import pytest
import tifffile

from mpmc_jax.data import stacks
from mpmc_jax.pixels import RGB, PixelFormat

BANDS = PixelFormat(3, mean=(0.0,), std=(1.0,), dtype="uint16")


@pytest.mark.parametrize(
    ("pixels", "dtype", "expected"),
    [(RGB, np.uint8, True), (BANDS, np.uint16, False)],
)
def test_three_gray_pages_are_three_rgb_images(pixels, dtype, expected, tmp_path):
    pages = np.arange(3 * 8 * 8, dtype=dtype).reshape(3, 8, 8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pages, photometric="minisblack")
    assert stacks.inspect_tiff(path, pixels) == (expected, ())
    if expected:
        with contextlib.closing(stacks.open_stack(path, pixels)) as stack:
            assert stack.depth == 3
            np.testing.assert_array_equal(
                stack.read(1), np.repeat(pages[1, :, :, None], 3, -1)
            )


def test_a_thumbnail_in_front_decides_nothing(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((4, 4, 3), np.uint8), photometric="rgb", subfiletype=1)
        for _ in range(3):
            file.write(np.zeros((8, 8), np.uint16), photometric="minisblack")
    assert stacks.inspect_tiff(path, BANDS) == (False, ())
