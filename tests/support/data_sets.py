"""Small data sets for the tests of the data code."""

import itertools
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from configs.base import get_base
from mpmc_jax.data import check, registry
from mpmc_jax.data.builders import synthetic

SIZES = ((40, 56), (36, 48))


def prepare_synthetic(data_dir, train=13, val=4):
    source = synthetic.make_source(train, val, sizes=SIZES)
    report = check.check_source(source)
    assert not report.problems
    registry.prepare(source, report.present, str(data_dir))
    return source


def config_for(data_dir, name="synthetic", batch_size=4, split="4", crop=32):
    config = get_base()
    config.data.name = name
    config.data.data_dir = str(data_dir)
    config.data.split = split
    config.data.crop = crop
    config.data.threads = 0
    config.train.batch_size = batch_size
    return config


def write_image(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([7, 8, 9] * 256)
    image.save(path)


def make_folder(
    root, images=12, classes=("a", "b", "c"), gray=False, palette_masks=False
):
    """A valid `folder` source: labels 0..2 and 255, sizes 20 x 24."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    shape = (20, 24) if gray else (20, 24, 3)
    for i in range(images):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        label = rng.choice(np.array([0, 1, 2, 255], np.uint8), (20, 24))
        write_image(root / "images" / f"im{i:02d}.png", image)
        mode = "P" if palette_masks else None
        write_image(root / "masks" / f"im{i:02d}.png", label, mode)
    (root / "classes.json").write_text(json.dumps({"classes": list(classes)}))
    return root


def real(name):
    """The folder of a real data set; skips the test where there is none."""
    folder = pathlib.Path(os.environ.get("MPMC_TEST_DATA", "/nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"MPMC_TEST_DATA is unset or holds no {name}")
    return folder


def take_batches(pipeline, count, start_step=0):
    """The first batches of a training pipeline from a step on."""
    iterator = pipeline.iterator(start_step)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()
