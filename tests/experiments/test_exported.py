"""Weights of a run that predict without it, and their model card."""

import re

import jax
import numpy as np
import pytest
from PIL import Image

from launch import convert_weights
from mpmc_jax import load_run
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.experiments import exported
from mpmc_jax.experiments.build import model_config
from mpmc_jax.experiments.run import Run
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
    convert.save(tmp_path / "ours.safetensors", exported.export(run, "streets", "best"))
    # Once more through the program, as anyone can who has the file.
    convert_weights.main(
        ["--input=ours.safetensors", "--output=model.safetensors", "--card"]
    )
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mpmc_jax\npipeline_tag: image-segm")
    for text in (
        "# dpt/tiny_dinov2 on streets",
        "road, sky, tree, car",
        "`unimatch_v2` with MPMC, 7 steps, on streets, split `92`",
        "mean 0.1, 0.2, 0.3 and deviation 0.5, 0.4, 0.3",
        "| began with | hub:a/b (Apache-2.0) |",
        "those of `teacher`",
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


def test_weights_without_their_run_do_not_predict(run, tmp_path):
    weights = exported.export(run, "streets", "best")
    for name, part in (("encoder", weights.encoder()), ("whole", weights)):
        convert.save(tmp_path / f"{name}.safetensors", part)
    with pytest.raises(WeightsError, match="encoder.safetensors has weights, but not"):
        load_run("encoder.safetensors")
    out = "--output=out.safetensors"
    with pytest.raises(SystemExit, match="--card is for the whole network of a run"):
        convert_weights.main(["--input=encoder.safetensors", out, "--card"])
    with pytest.raises(SystemExit, match="--card is for --layout=mpmc, not torch"):
        convert_weights.main(
            ["--input=whole.safetensors", out, "--card", "--layout=torch"]
        )
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(SystemExit, match="README.md is no model card .* move it"):
        convert_weights.main(["--input=whole.safetensors", out, "--card"])
    assert (tmp_path / "README.md").read_text() == "# Mine"
