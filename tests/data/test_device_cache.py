"""Crops gathered on the device are those that the host cuts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpmc_jax.data import build, crop_plan, device_cache
from mpmc_jax.data.geometry import registry
from mpmc_jax.data.geometry.cropping import CropConfig
from mpmc_jax.pixels import GRAY, RGB
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.types import Batch, Crops, Streams
from tests.data.test_acdc import prepare
from tests.support import trees
from tests.support.data_sets import config_for, prepare_synthetic, take_batches

STREAMS = {
    "unimatch": Streams(partner="same"),
    "augseg": Streams(order="drawn", geometry="augseg", fill="mean"),
    "ael": Streams(
        partner="same",
        source_scales=(0.25, 1.0),
        order="restarted",
        geometry="u2pl",
        fill="rounded_mean",
    ),
}


def _both(config, streams, count=4):
    """The same batches, cut on the host and on the device."""
    with_host = build.build_train(config, streams)
    config.data.resident = True
    with_device = build.build_train(config, streams)
    images = with_device.device_cache
    cut = jax.jit(images.cut)
    found = [cut(images.arrays, batch) for batch in take_batches(with_device, count)]
    return take_batches(with_host, count), found


def _assert_same(expected: Batch, found: Batch, tolerance: int):
    for name in ("labeled", "unlabeled", "partner", "source"):
        one, other = getattr(expected, name), getattr(found, name)
        assert (one is None) == (other is None)
        if one is None:
            continue
        for field in ("extent", "index", "batch_index", "label"):
            given, got = getattr(one, field), getattr(other, field)
            assert (given is None) == (got is None), field
            if given is not None:
                np.testing.assert_array_equal(got, given)
                assert got.dtype == given.dtype
        assert one.image.dtype == other.image.dtype
        difference = np.asarray(one.image, float) - np.asarray(other.image, float)
        assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("name", STREAMS)
def test_batches_are_the_hosts(name, tmp_path):
    prepare_synthetic(tmp_path)
    # 80 pixels are more than the smaller sizes, so that there is padding.
    config = config_for(tmp_path, crop=80)
    config.train.group_size = 4
    # PyTorch's interpolation is in floats, which a compiler may contract.
    tolerance = 1 if name == "ael" else 0
    for expected, found in zip(*_both(config, STREAMS[name]), strict=True):
        _assert_same(expected, found, tolerance)
    if name == "ael":
        there = np.concatenate(
            [b.source.extent.any(1) for b in _both(config, STREAMS[name])[1]]
        )
        assert there.any() and not there.all()


def test_deep_slices_are_the_hosts(tmp_path):
    trees.make_acdc_h5(tmp_path / "h5")
    prepare(tmp_path / "h5", tmp_path / "data")
    config = config_for(tmp_path / "data", "acdc", split="3", crop=24)
    config.data.allow_absent_classes = True
    streams = Streams(partner="other", geometry="acdc")
    expected, found = _both(config, streams, count=6)
    assert expected[0].labeled.image.dtype == np.float32
    for one, other in zip(expected, found, strict=True):
        _assert_same(one, other, 0)


def test_deep_images_are_not_resampled_on_the_device(tmp_path):
    trees.make_acdc_h5(tmp_path / "h5")
    prepare(tmp_path / "h5", tmp_path / "data")
    config = config_for(tmp_path / "data", "acdc", split="3", crop=24)
    config.data.allow_absent_classes = config.data.resident = True
    with pytest.raises(ValueError, match=r"float32.*data\.resident=false"):
        build.build_train(config, Streams())


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(3, 70),
    columns=st.integers(3, 70),
    scales=st.tuples(st.floats(0.2, 2.5), st.floats(0.2, 2.5)).map(sorted),
    name=st.sampled_from(["unimatch", "augseg", "u2pl"]),
    gray=st.booleans(),
)
def test_plans_are_followed(seed, rows, columns, scales, name, gray):
    rng = np.random.default_rng(seed)
    pixels = GRAY if gray else RGB
    shape = (rows, columns) if gray else (rows, columns, 3)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    label = rng.integers(0, 5, (rows, columns), dtype=np.uint8)
    crop = CropConfig(24, *scales)
    geometry = registry.build_geometry(name)
    cut = geometry.draw(rng, (rows, columns), crop)
    shrink = max(rows / cut.resized[0], columns / cut.resized[1])
    filter_taps = crop_plan.filter_taps_needed(geometry.resampling, shrink)
    plan = crop_plan.plan(
        cut, (rows, columns), crop, filter_taps=filter_taps, stride=columns
    )
    padded = np.pad(image.reshape(rows, columns, -1), ((0, 9), (0, 5), (0, 0)))
    arrays = {
        "image": padded[None],
        "label": np.pad(label, ((0, 9), (0, 5)))[None],
    }
    one = jax.tree.map(lambda x: x[None], plan)
    extent = cut.extent()[None]
    crops = Crops(image=one, extent=extent, index=np.zeros(1, int), batch_index=None)
    fill = np.zeros(pixels.channels, np.uint8)
    arrays = jax.tree.map(jnp.asarray, arrays)
    found = device_cache.cut_stream(arrays, crops, fill, geometry.label_fill)
    expected = cut.image(Image.fromarray(image), crop, pixels)
    difference = np.asarray(found.image[0], int) - expected
    assert np.abs(difference).max() <= 1
    np.testing.assert_array_equal(found.label[0], cut.label(label, crop))


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_placing_finishes_batches_on_their_devices(kind, tmp_path):
    prepare_synthetic(tmp_path)
    config = config_for(tmp_path)
    config.train.group_size = 1
    streams = STREAMS["unimatch"]
    parallel = Parallel(kind, Layout(4, 1, 1), 4)
    (plain,) = take_batches(build.build_train(config, streams), 1)
    config.data.resident = True
    pipeline = build.build_train(config, streams)
    place = parallel.placing(pipeline.device_cache.arrays, pipeline.device_cache.cut)
    (planned,) = take_batches(pipeline, 1)
    expected, found = parallel.place(plain), place(planned)
    for one, other in zip(
        jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
