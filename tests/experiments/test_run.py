"""Runs from Python: trained, restored, used for predictions and evaluated."""

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import synthetic
from mpmc_jax import load_run, train
from mpmc_jax.training.workdir import WorkdirError
from tests.support.data_sets import SIZES, prepare_synthetic
from tests.support.programs import ENVIRONMENT, ROOT, read_metrics

pytestmark = pytest.mark.full

# What `pip install .` needs of the checkout.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.txt")

THREE_LINES = """
from mpmc_jax import load_run
run = load_run({workdir!r})
classes = run.predict({image!r})

import mpmc_jax
print(mpmc_jax.__file__, classes.dtype, classes.shape, int(classes.sum()), sep="\\n")
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The directory of a run of two steps."""
    place = tmp_path_factory.mktemp("runs")
    prepare_synthetic(place / "data", train=13, val=4)
    config = synthetic.get_config("method=supervised,backbone=resnet18,split=4")
    config.data.data_dir = str(place / "data")
    config.data.crop, config.model.width = 33, 8
    config.train.batch_size, config.train.steps, config.train.devices = 2, 2, 1
    config.eval.pad_to = 0
    with contextlib.ExitStack() as stack:
        # A run sets the matmul precision of its process.
        before = jax.config.values["jax_default_matmul_precision"]
        stack.callback(jax.config.update, "jax_default_matmul_precision", before)
        assert int(train(config, place / "run").step) == 2
        yield place / "run"


@pytest.fixture(scope="module")
def image(workdir):
    """An image as a file, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZES[0], 3), np.uint8)
    path = workdir.parent / "image.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def test_predictions_of_arrays_and_files(workdir, image):
    path, pixels = image
    run = load_run(workdir)
    classes = run.predict(pixels)
    assert classes.shape == SIZES[0] and classes.dtype == np.uint8
    assert classes.max() < run.facts.num_classes
    for given in (path, str(path)):
        np.testing.assert_array_equal(run.predict(given), classes)
    whole, part = run.predict([path, pixels[:30]])
    np.testing.assert_array_equal(whole, classes)
    assert part.shape == (30, SIZES[0][1])
    for wrong in (pixels[..., 0], pixels[..., :2], pixels / 255):
        with pytest.raises(ValueError, match=r"takes \(height, width, 3\) of type uin"):
            run.predict(wrong)


def test_an_evaluation_equals_that_of_training(workdir):
    run = load_run(str(workdir), checkpoint=2)
    metrics = read_metrics(workdir)[-1]
    result = run.evaluate("val")
    scalars = result.scalars(run.facts.class_names)
    assert scalars["miou"] == metrics["val/miou"]
    windows = run.evaluate("val", protocol="center_crop", crop=17)
    assert windows.protocol == "center_crop"
    assert windows.confusion.sum() <= 4 * 17**2 < result.confusion.sum()
    # The options are of one call.
    assert run.config.data.crop == 33 and run.config.eval.protocol == "whole"
    with pytest.raises(ValueError, match="--crop=33 is for protocols with windows"):
        run.evaluate("val", crop=33)
    with pytest.raises(ValueError, match=r"eval\.protocol='tiles' is unknown; valid: "):
        run.evaluate("val", protocol="tiles")


def test_a_directory_that_holds_no_run_is_said_in_a_line(tmp_path):
    with pytest.raises(WorkdirError, match="holds no run: .*checkpoints does not exis"):
        load_run(tmp_path)


@pytest.mark.skipif(
    int(importlib.metadata.version("setuptools").partition(".")[0]) < 77,
    reason="building the wheel needs setuptools 77",
)
def test_an_installed_wheel_segments_an_image_in_three_lines(workdir, image, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "mpmc_jax", source / "mpmc_jax")
    for folder in ("configs", "launch", "tests"):
        (source / folder).mkdir()
        (source / folder / "__init__.py").touch()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
    offline = ("--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([*pip, *offline, "--target", site, source], check=True)
    (package, metadata) = sorted(os.listdir(site))
    assert package == "mpmc_jax" and metadata.endswith(".dist-info")
    path, pixels = image
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            THREE_LINES.format(workdir=str(workdir), image=str(path)),
        ],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, dtype, shape, total = done.stdout.splitlines()
    assert found == str(site / "mpmc_jax" / "__init__.py")
    classes = load_run(workdir).predict(pixels)
    assert (dtype, shape) == (str(classes.dtype), str(classes.shape))
    assert int(total) == classes.sum()
