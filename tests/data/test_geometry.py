import numpy as np
import pytest
from PIL import Image

from mpmc_jax.data.geometry import registry as geometries
from mpmc_jax.data.geometry.cropping import FILLS, CropConfig, Placement
from mpmc_jax.pixels import RGB, PixelFormat

# The geometries that resample as Pillow does.
PILLOW = ("augseg", "unimatch")
# ImageNet's mean in bytes, truncated and rounded.
COLORS = {"black": (0, 0, 0), "mean": (123, 116, 103), "rounded_mean": (124, 116, 104)}


def _photo(rng, rows, columns):
    """Smooth, with some noise: like a photograph and unlike white noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((columns, rows), Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 3, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _two_steps(image, placement, resample):
    """Resizes the whole, then cuts the window out: what a `Placement` does at once."""
    whole = np.asarray(image.resize(placement.resized[::-1], resample))
    top, left, bottom, right = placement.window
    window = whole[top:bottom, left:right]
    return window[:, ::-1] if placement.flip else window


@pytest.mark.parametrize("name", PILLOW)
def test_one_call_equals_resize_then_crop(name):
    rng = np.random.default_rng(1)
    differing = []
    for _ in range(150):
        size = tuple(int(v) for v in rng.integers(20, 220, 2))
        config = CropConfig(int(rng.integers(16, 160)))
        image = _photo(rng, *size)
        label = rng.integers(0, 256, size, dtype=np.uint8)
        placement = geometries.GEOMETRIES[name].draw(rng, size, config)
        top, left, bottom, right = placement.extent()
        crop = placement.image(image, config, RGB)[top:bottom, left:right]
        expected = _two_steps(image, placement, Image.Resampling.BILINEAR)
        difference = np.abs(crop.astype(int) - expected)
        # Pillow takes `box` in single precision, and rounds after each of two passes.
        assert difference.max() <= 2
        differing.append((difference > 0).mean())
        nearest = _two_steps(
            Image.fromarray(label), placement, Image.Resampling.NEAREST
        )
        labels = placement.label(label, config)[top:bottom, left:right]
        np.testing.assert_array_equal(labels, nearest)
    assert np.median(differing) < 0.005
    assert np.mean(differing) < 0.08


def _interpolate(pixels, size):
    """Half-pixel bilinear interpolation without antialias, one value at a time."""
    (height, width), (rows, columns) = pixels.shape[:2], size
    out = np.zeros((rows, columns, pixels.shape[2]))
    for i, j in np.ndindex(rows, columns):
        y = max((i + 0.5) * height / rows - 0.5, 0)
        x = max((j + 0.5) * width / columns - 0.5, 0)
        top, left = int(y), int(x)
        for row, a in ((top, 1 - y + top), (min(top + 1, height - 1), y - top)):
            for column, b in (
                (left, 1 - x + left),
                (min(left + 1, width - 1), x - left),
            ):
                out[i, j] += a * b * pixels[row, column]
    return out


def test_u2pl_interpolates_flips_and_pads_on_both_sides():
    rng = np.random.default_rng(5)
    padded = 0
    for _ in range(40):
        size = tuple(int(v) for v in rng.integers(8, 40, 2))
        config = CropConfig(32, fill="rounded_mean")
        image = _photo(rng, *size)
        label = rng.integers(0, 256, size, dtype=np.uint8)
        placement = geometries.draw_u2pl(rng, size, config)
        rows, columns = placement.resized
        whole = _interpolate(np.asarray(image, float), placement.resized)
        nearest = label[np.arange(rows) * size[0] // rows]
        nearest = nearest[:, np.arange(columns) * size[1] // columns]
        if placement.flip:
            whole, nearest = whole[:, ::-1], nearest[:, ::-1]
        before = [max(32 - side, 0) // 2 for side in placement.resized]
        around = [
            (first, max(32 - side, 0) - first)
            for first, side in zip(before, placement.resized, strict=True)
        ]
        top, left, bottom, right = placement.window
        if placement.flip:
            left, right = columns - right, columns - left
        padding = np.pad(nearest[top:bottom, left:right], around)
        np.testing.assert_array_equal(placement.label(label, config), padding)
        real = np.pad(np.ones((bottom - top, right - left), bool), around)
        crop = placement.image(image, config, RGB)
        # Half a level of rounding, and float32.
        difference = np.abs(crop[real] - whole[top:bottom, left:right].reshape(-1, 3))
        assert difference.max() < 0.501
        assert (crop[~real] == (124, 116, 104)).all()
        a, b, c, d = placement.extent()
        assert real[a:c, b:d].all() and real.sum() == (c - a) * (d - b)
        padded += not real.all()
    assert padded > 5


def test_u2pl_shrinks_half_of_the_time():
    rng = np.random.default_rng(6)
    config = CropConfig(10, 0.5, 2.0)
    rows = [
        geometries.draw_u2pl(rng, (1000, 1000), config).resized[0] for _ in range(2000)
    ]
    assert min(rows) >= 500 and max(rows) <= 2000
    assert 0.45 < np.mean(np.array(rows) < 1000) < 0.55
    assert 700 < np.median([r for r in rows if r < 1000]) < 800


def test_doubling_is_bit_identical():
    image = _photo(np.random.default_rng(2), 64, 96)
    config = CropConfig(50)
    placement = Placement((128, 192), (13, 57, 63, 107), True, 0)
    np.testing.assert_array_equal(
        placement.image(image, config, RGB),
        _two_steps(image, placement, Image.Resampling.BILINEAR),
    )


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("fill", sorted(FILLS))
def test_extent_separates_image_from_padding(name, fill):
    rng = np.random.default_rng(3)
    config = CropConfig(64, 0.3, 1.6, fill=fill)
    image = Image.fromarray(np.full((50, 90, 3), 200, np.uint8))
    label = np.full((50, 90), 3, np.uint8)
    columns = set()
    for _ in range(60):
        placement = geometries.GEOMETRIES[name].draw(rng, (50, 90), config)
        top, left, bottom, right = placement.extent()
        real = np.zeros((64, 64), bool)
        real[top:bottom, left:right] = True
        crop = placement.image(image, config, RGB)
        np.testing.assert_array_equal(crop[real], 200)
        assert (crop[~real] == COLORS[fill]).all()
        labels = placement.label(label, config)
        np.testing.assert_array_equal(labels, np.where(real, 3, 255))
        if not real.all(axis=0).any() or right - left < 64:
            columns.add((placement.flip, int(left) == 0))
    # UniMatch flips the padded crop; AugSeg pads what it has flipped.
    expected = {(False, True), (True, name == "augseg")}
    assert {c for c in columns if c in expected} == expected
    if name == "augseg":
        assert all(at_left for _, at_left in columns)


@pytest.mark.parametrize("name", ["augseg", "u2pl", "unimatch"])
def test_draws_cover_their_ranges(name):
    rng = np.random.default_rng(4)
    config = CropConfig(10, 0.5, 2.0)
    drawn = [
        geometries.GEOMETRIES[name].draw(rng, (10, 20), config) for _ in range(2000)
    ]
    long = {placement.resized[1] for placement in drawn}
    assert min(long) == 10
    # A continuous factor below 2 never floors to the upper end.
    assert max(long) == (40 if name == "unimatch" else 39)
    assert 0.45 < np.mean([placement.flip for placement in drawn]) < 0.55
    widest = [p for p in drawn if p.resized[1] >= 30]
    starts = {p.window[1] for p in widest}
    assert min(starts) == 0
    assert max(p.window[3] - p.resized[1] for p in widest) == 0
    for p in drawn:
        assert 0 <= p.window[0] < p.window[2] <= p.resized[0]
        assert 0 <= p.window[1] < p.window[3] <= p.resized[1]
        assert p.window[3] - p.window[1] == min(10, p.resized[1])


def test_unimatch_rounds_the_short_side_half_up():
    class LongSide25:
        def integers(self, low, high, endpoint):
            return 25 if low else 0

        def random(self):
            return 0.9

    placement = geometries.draw_unimatch(LongSide25(), (30, 50), CropConfig(8))
    assert placement.resized == (15, 25)
    placement = geometries.draw_unimatch(LongSide25(), (21, 50), CropConfig(8))
    assert placement.resized == (11, 25)  # 10.5 goes up.


def test_no_flip_when_switched_off_and_draws_stay_the_same():
    for name in ("unimatch", "augseg", "u2pl"):
        draw = geometries.GEOMETRIES[name].draw
        on = CropConfig(16)
        off = CropConfig(16, flip=False)
        for seed in range(20):
            a = draw(np.random.default_rng(seed), (40, 60), on)
            b = draw(np.random.default_rng(seed), (40, 60), off)
            assert not b.flip
            assert a.resized == b.resized
            if name == "unimatch":
                assert a.window == b.window


def test_gray_images_keep_one_channel():
    config = CropConfig(30, fill="mean")
    placement = Placement((20, 20), (0, 0, 20, 20), False, 0)
    gray = PixelFormat(1, mean=(0.45,), std=(1.0,))
    crop = placement.image(Image.new("L", (20, 20), 9), config, gray)
    assert crop.shape == (30, 30, 1)
    assert crop[0, 0, 0] == 9
    assert crop[29, 29, 0] == 114


def test_settings_are_checked():
    with pytest.raises(ValueError, match="scale_min=2"):
        CropConfig(8, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"data\.crop"):
        CropConfig(0)
    with pytest.raises(ValueError, match="black"):
        CropConfig(8, fill="pink")
    with pytest.raises(ValueError, match="augseg.*unimatch"):
        geometries.build_geometry("random")
