"""Weights of a run that predict without it, and their model card."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from launch import export
from mpmc_jax import load_run
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.experiments import exported, programs
from mpmc_jax.experiments.build import model_config
from mpmc_jax.experiments.run import Run, with_protocol
from mpmc_jax.models import build_segmenter
from mpmc_jax.models.weights import convert
from mpmc_jax.models.weights.files import WeightsError
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.plugins.base import Identity
from tests.support import tiny
from tests.support.variables import random_variables

NAMES = ("road", "sky", "tree", "car")
# Another normalization than any encoder's.
PIXELS = PixelFormat(3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
ORIGIN = {"file": "model.safetensors", "hub": "hub:a/b", "license": "Apache-2.0"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    cfg = tiny.config(
        "method=unimatch_v2,mpmc=paper",
        model__name="dpt",
        model__backbone="tiny_dinov2",
        data__crop=32,
        data__split="92",
        mpmc__tap="auto",
    )
    model = model_config(cfg, len(NAMES), 3)
    monkeypatch.chdir(tmp_path)
    palette = ((0, 0, 0),) * len(NAMES)
    # A run sets the matmul precision of its process.
    before = jax.config.values["jax_default_matmul_precision"]
    yield Run(
        config=cfg,
        facts=DatasetFacts("streets", NAMES, palette, PIXELS, fingerprint="0"),
        model=model,
        module=build_segmenter(model),
        variables=random_variables(model),
        step=7,
        network_name="teacher",
        plugin=Identity(),
        probe=None,
        manifest={"pretrained": ORIGIN},
    )
    jax.config.update("jax_default_matmul_precision", before)


def test_three_lines_of_the_card_predict_as_the_run_does(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (27, 45, 3), np.uint8)
    Image.fromarray(pixels).save("image.png")
    exported.write_weights(run, tmp_path, "streets", "best", {"miou": 0.51234})
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mpmc_jax\npipeline_tag: image-segm")
    for text in (
        "# dpt/tiny_dinov2 on streets",
        "road, sky, tree, car",
        "`unimatch_v2` with MPMC, 7 steps, on streets, split `92`",
        "mean 0.1, 0.2, 0.3 and deviation 0.5, 0.4, 0.3",
        "| began with | hub:a/b (Apache-2.0) |",
        "those of `teacher`",
        "| miou on the validation split | 0.5123 |",
    ):
        assert text in card
    count = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    assert f"{count:,} parameters" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    found = {}
    exec(code.replace("image.jpg", "image.png"), found)
    np.testing.assert_array_equal(found["classes"], run.predict(pixels))
    read = found["run"]
    assert read.config.data.split == "92" and read.facts == run.facts
    assert (read.step, read.network_name, read.model) == (7, "teacher", run.model)


@pytest.fixture
def _source_files():
    """Programs name their source files, as outside of the tests."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 100)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("_source_files")
def test_folders_of_the_machine_are_not_exported(convolutional, tmp_path):
    run = convolutional
    run.config.data.data_dir = run.config.data.labeled_ids = "/home/alice/ids.txt"
    run.config.model.pretrained = "/home/alice/start.pth"
    exported.write_description(run, tmp_path)
    exported.write_weights(run, tmp_path, "streets", "best")
    exported.write_programs(run, tmp_path, "stablehlo", [(32, 32)], ["cpu"])
    contents = [path.read_bytes() for path in tmp_path.iterdir()]
    for content in contents:
        assert (
            b"alice" not in content and str(programs.__file__).encode() not in content
        )
    assert any(b"programs.py" in content for content in contents)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["labeled_ids"] == "ids.txt"
    assert config["model"]["pretrained"] == "start.pth"
    assert run.config.data.labeled_ids.startswith("/home")


def test_a_run_below_the_home_directory_keeps_its_scores(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(export.runs, "load_run", lambda *arguments: run)
    line = json.dumps({"step": run.step, "val/miou": 0.51234}) + "\n"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text(line)
    export.main(["--workdir=~/runs", f"--output={tmp_path / 'out'}"])
    assert "| 0.5123 |" in (tmp_path / "out" / "README.md").read_text()


def test_weights_without_their_run_do_not_predict(run, tmp_path):
    weights = exported.export(run, "streets", "best")
    for name, part in (("encoder", weights.encoder()), ("whole", weights)):
        convert.save(tmp_path / f"{name}.safetensors", part)
    with pytest.raises(WeightsError, match="encoder.safetensors has weights, but not"):
        load_run("encoder.safetensors")


@pytest.fixture
def convolutional(run):
    """The run with a network that takes images of any size."""
    cfg = tiny.config("method=unimatch", data__crop=32)
    model = model_config(cfg, len(NAMES), 3)
    return dataclasses.replace(
        run,
        config=cfg,
        model=model,
        module=build_segmenter(model),
        variables=random_variables(model),
    )


def load_program(folder, form, file):
    """The function that the written loader makes of a program."""
    found = {"__name__": "loader"}
    exec((folder / f"predict_{form}.py").read_text(), found)
    return found["load"](str(folder / file))


def images(size, count=2):
    rng = np.random.default_rng(size)
    return rng.integers(0, 256, (count, *size, 3), np.uint8)


def test_a_program_for_any_size_predicts_as_the_run_does(convolutional, tmp_path):
    exported.write_programs(convolutional, tmp_path, "stablehlo", [None])
    program = load_program(tmp_path, "stablehlo", "segment_any.stablehlo")
    for size in ((33, 45), (40, 27)):
        given = images(size)
        classes, probabilities = map(np.asarray, program(given))
        assert classes.dtype == np.uint8 and probabilities.dtype == np.float32
        expected = convolutional.predict(list(given))
        np.testing.assert_array_equal(classes, expected)
        assert len(np.unique(classes)) > 1
        exact = [convolutional.predictor.probabilities(image) for image in given]
        np.testing.assert_allclose(probabilities, exact, atol=1e-5)


@pytest.mark.full
def test_windows_are_inside_a_program_for_one_size(convolutional, tmp_path):
    for protocol in ("slide_u2pl", "slide_unimatch"):
        run = with_protocol(convolutional, protocol=protocol, crop=24, flip=True)
        exported.write_programs(run, tmp_path, "stablehlo", [(33, 45)], ["cpu"])
        given = images((33, 45))
        program = load_program(tmp_path, "stablehlo", "segment_33x45.stablehlo")
        np.testing.assert_array_equal(program(given)[0], run.predict(list(given)))


@pytest.mark.full
@pytest.mark.parametrize("protocol", ["whole", "slide_u2pl"])
def test_an_onnx_model_predicts_as_the_run_does(protocol, convolutional, tmp_path):
    pytest.importorskip("jax2onnx")
    run = with_protocol(convolutional, protocol=protocol)
    sizes = [(33, 45), (40, 27)]
    exported.write_programs(run, tmp_path, "onnx", sizes)
    for size in sizes:
        given = images(size)
        program = load_program(tmp_path, "onnx", f"segment_{size[0]}x{size[1]}.onnx")
        classes, probabilities = program(given)
        assert classes.dtype == np.uint8
        np.testing.assert_array_equal(classes, run.predict(list(given)))
        exact = [run.predictor.probabilities(image) for image in given]
        np.testing.assert_allclose(probabilities, exact, atol=1e-5)


def test_a_transformer_has_a_program_for_each_size(run, tmp_path):
    exported.write_programs(run, tmp_path, "stablehlo", [(27, 45)], ["cpu"])
    given = images((27, 45), count=1)
    program = load_program(tmp_path, "stablehlo", "segment_27x45.stablehlo")
    np.testing.assert_array_equal(program(given)[0], run.predict(list(given)))


def test_what_needs_one_size_says_so(run, convolutional):
    windows = with_protocol(convolutional, protocol="slide_u2pl")
    for each in (run, windows, with_protocol(convolutional, flip=True)):
        with pytest.raises(ValueError, match="--size=any: .* as in --size=512x1024"):
            programs.check_size(each, None)
        programs.check_size(each, (512, 1024))
    with pytest.raises(ValueError, match="onnx has a model for each size"):
        programs.to_onnx(convolutional, None)


def test_a_missing_package_is_named(convolutional, monkeypatch):
    for name, make in (
        ("flatbuffers", programs.to_stablehlo),
        ("jax2onnx", programs.to_onnx),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=f"needs {name}; docs/export.md"):
            make(convolutional, (32, 32))
