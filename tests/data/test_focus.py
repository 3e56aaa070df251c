"""Labeled crops that are centered on pixels of chosen classes."""

import chex
import jax
import numpy as np
import pytest

from mpmc_jax.data import build
from mpmc_jax.data.geometry.cropping import ClassFocus, CropConfig, Placement
from mpmc_jax.data.geometry.focus import focused
from mpmc_jax.data.geometry.registry import GEOMETRIES
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for, prepare_synthetic, take_batches

SIZE = (60, 90)
STREAMS = {
    "unimatch": Streams(partner="same"),
    "augseg": Streams(order="drawn", geometry="augseg", fill="mean"),
    "u2pl": Streams(geometry="u2pl", fill="rounded_mean"),
}


def test_the_window_is_moved_as_far_as_the_image_goes():
    placement = Placement((60, 90), (0, 0, 20, 30), flip=False, column=0)
    # The image as stored has half as many rows and columns.
    assert placement.centered((15, 20), (30, 45)).window == (21, 26, 41, 56)
    assert placement.centered((0, 44), (30, 45)).window == (0, 60, 20, 90)
    # A window as large as the image stays.
    whole = Placement((60, 90), (0, 0, 60, 90), flip=True, column=5)
    assert whole.centered((29, 44), (30, 45)) == whole


@pytest.mark.parametrize("name", ["unimatch", "augseg", "u2pl"])
def test_the_drawn_pixel_is_in_the_middle_of_the_crop(name):
    """One pixel of class 2, in images larger than the crop."""
    crop = CropConfig(21, scale_min=1.0, scale_max=1.0)
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        at = rng.integers(12, SIZE[0] - 12), rng.integers(12, SIZE[1] - 12)
        label_hw = np.ones(SIZE, np.uint8)
        label_hw[at] = 2
        cut = GEOMETRIES[name].draw(rng, SIZE, crop)
        moved = focused(rng, cut, label_hw, ClassFocus(1.0, (2, 3)))
        assert (moved.flip, moved.resized) == (cut.flip, cut.resized)
        found += np.argwhere(moved.label(label_hw, crop) == 2).tolist()
    assert len(found) == 40
    assert {row for row, _ in found} == {10}
    assert {column for _, column in found} == {10}


def test_classes_are_drawn_alike_and_as_often_as_asked_for():
    """Class 2 has a pixel, class 1 hundreds, class 3 none."""
    label_hw = np.zeros(SIZE, np.uint8)
    label_hw[:, :10] = 1
    label_hw[40, 70] = 2
    crop = CropConfig(21, scale_min=1.0, scale_max=1.0, flip=False)
    drawn = np.zeros(3)
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        cut = GEOMETRIES["unimatch"].draw(rng, SIZE, crop)
        moved = focused(rng, cut, label_hw, ClassFocus(0.5, (1, 2, 3)))
        if moved == cut:
            drawn[0] += 1
        elif moved.window == (30, 60, 51, 81):
            drawn[2] += 1
        else:
            assert moved.window[1] == 0
            drawn[1] += 1
    np.testing.assert_allclose(drawn / 2000, (0.5, 0.25, 0.25), atol=0.04)
    rng = np.random.default_rng(0)
    nothing = focused(rng, cut, np.zeros(SIZE, np.uint8), ClassFocus(1.0, (1,)))
    assert nothing is cut


@pytest.mark.parametrize("name", STREAMS)
def test_batches_are_the_same_anywhere_and_from_any_step_on(name, tmp_path):
    """On the host, on the device, by several processes and after a restart."""
    prepare_synthetic(tmp_path)
    config = config_for(tmp_path, crop=16)
    config.imbalance.crop_classes = (6, 8)  # pole, sign
    plain = take_batches(build.build_train(config, STREAMS[name]), 4)
    config.imbalance.crop_probability = 0.7
    pipeline = build.build_train(config, STREAMS[name])
    batches = take_batches(pipeline, 4)
    # Nothing else moves: neither unlabeled crops nor which images come.
    for one, other in zip(plain, batches, strict=True):
        chex.assert_trees_all_equal(one.unlabeled, other.unlabeled)
        chex.assert_trees_all_equal(one.labeled.index, other.labeled.index)
    share = [
        np.mean(np.isin([b.labeled.label for b in found], (6, 8)))
        for found in (plain, batches)
    ]
    assert share[1] > 1.2 * share[0]
    iterator = pipeline.iterator(2)
    chex.assert_trees_all_equal(next(iterator), batches[2])
    iterator.close()
    other = build.build_train(config, STREAMS[name], process_index=1, process_count=2)
    (mine,) = take_batches(other, 1)
    chex.assert_trees_all_equal(mine, jax.tree.map(lambda x: x[1::2], batches[0]))
    config.data.resident = True
    cached = build.build_train(config, STREAMS[name])
    cut = jax.jit(cached.device_cache.cut)
    for batch, plan in zip(batches, take_batches(cached, 4), strict=True):
        found = cut(cached.device_cache.arrays, plan)
        np.testing.assert_array_equal(found.labeled.label, batch.labeled.label)
        np.testing.assert_array_equal(found.labeled.extent, batch.labeled.extent)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("crop_probability", 1.5, "crop_probability=1.5: must lie in .0, 1."),
        ("crop_classes", (1, 9), "give numbers of the classes 0 to 8, or"),
        ("crop_classes", ("car",), "give numbers of the classes"),
        ("crop_classes", (1.0,), "give numbers of the classes"),
        ("geometry", "acdc", "with data.geometry='acdc' crops are whole images"),
    ],
)
def test_settings_that_choose_nothing_are_refused(tmp_path, key, value, message):
    prepare_synthetic(tmp_path, train=5, val=1)
    config = config_for(tmp_path)
    config.imbalance.crop_probability = 0.5
    section = config.data if key == "geometry" else config.imbalance
    section[key] = value
    with pytest.raises(ValueError, match=message):
        build.build_train(config, Streams())


def test_without_classes_all_but_the_first_are_meant(tmp_path):
    prepare_synthetic(tmp_path, train=5, val=1)
    config = config_for(tmp_path)
    config.imbalance.crop_probability = 0.25
    pipeline = build.build_train(config, Streams())
    assert pipeline._config.crop_config.focus == ClassFocus(0.25, tuple(range(1, 9)))
