"""Every figure, drawn from saved runs; a mistake is one line."""

import csv
import functools
import io
import types

import numpy as np
import pytest
from PIL import Image

from launch.experiments import __main__ as experiments
from mpmc_jax import load_run
from mpmc_jax.analysis import registry
from mpmc_jax.analysis.examples import open_common
from mpmc_jax.experiments.patch_screen import open_screen

# Figure -> which runs it takes, its options, columns of its table.
FIGURES = {
    "figure1": ("mpmc", {"images": 2}, "segmentation_alone"),
    "figure3": ("baseline mpmc", {"images": 2}, "pixel_accuracy"),
    "figure4": ("baseline mpmc", {"classes": "road+building"}, "area_to"),
    "figure5": ("baseline mpmc", {"pixels": 20}, "x"),
    "supp_figure1": ("mpmc", {}, "energy"),
    "table4": ("baseline mpmc", {}, "miou_change"),
    "pseudo_labels": ("mpmc", {}, "auroc_lambda"),
    "reliability": ("baseline mpmc", {}, "expected_calibration_error"),
    "confusion": ("baseline mpmc", {}, "share"),
    "panels": ("mpmc", {"images": 4}, "lambda_s_mean"),
    "curves": ("baseline mpmc", {}, "value"),
    "evidence0": (
        "baseline mpmc",
        {"taps": "layer1", "steps": 3, "images": 6},
        "auroc",
    ),
}


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def draw(trained, name, output, how=None):
    """Draws a figure as `FIGURES` or `how` say, and returns the rows of its table."""
    names, options, column = how or FIGURES[name]
    runs = [getattr(trained, run) for run in names.split()]
    png, svg, table, *_ = registry.make(name, runs, output, options=options)
    with Image.open(png) as picture:
        assert min(picture.size) > 90
    assert b"<svg" in svg.read_bytes()
    rows = rows_of(table)
    assert rows and column in rows[0]
    return rows


def test_every_figure_is_tried():
    assert FIGURES.keys() == registry.FIGURES.keys()


@pytest.fixture(scope="session")
def drawn(trained, tmp_path_factory):
    """The rows of a figure's table by its name; each figure is drawn once."""

    @functools.cache
    def rows(name):
        return draw(trained, name, tmp_path_factory.mktemp(name))

    return rows


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn(drawn, name):
    assert drawn(name)


def test_a_pseudo_label_row_per_checkpoint(trained, drawn, tmp_path):
    rows = drawn("pseudo_labels")
    assert [row["step"] for row in rows] == ["2", "4"]
    for row in rows:
        right, wrong = (float(row[f"{kind}_pixels"]) for kind in ("right", "wrong"))
        assert float(row["accuracy"]) == pytest.approx(right / (right + wrong))
        for name in ("lambda", "oracle"):
            parts = [float(row[f"{name}_{kind}"]) for kind in ("right", "wrong")]
            mean = (right * parts[0] + wrong * parts[1]) / (right + wrong)
            assert mean == pytest.approx(1, abs=1e-4)
    path = registry.make("pseudo_labels", [trained.mpmc], tmp_path, checkpoint="2")[-1]
    assert [row["step"] for row in rows_of(path)] == ["2"]


def test_tables_of_accuracy_agree_with_the_evaluation(trained, drawn):
    """Instances, boxes, reliability and confusion count the pixels of the evaluator."""
    result = load_run(trained.mpmc).evaluate("val")
    accuracy = np.trace(result.confusion) / result.confusion.sum()
    rows = [row for row in drawn("confusion") if row["run"] == "mpmc"]
    np.testing.assert_array_equal(
        [int(row["pixels"]) for row in rows], result.confusion.ravel()
    )
    rows = drawn("reliability")
    own = [row for row in rows if row["run"] == "mpmc"]
    shares, accuracies = (
        [float(row[key]) for row in own] for key in ("share", "accuracy")
    )
    np.testing.assert_allclose(np.dot(shares, accuracies), accuracy)
    rows = drawn("figure4")
    names = load_run(trained.mpmc).facts.class_names
    for name in ("road", "building"):
        own = [row for row in rows if (row["run"], row["class"]) == ("mpmc", name)]
        number = names.index(name)
        pixels = [int(row["pixels"]) for row in own]
        assert sum(pixels) == result.confusion[number].sum()
        right = np.dot(pixels, [float(row["pixel_accuracy"]) for row in own])
        np.testing.assert_allclose(right, result.confusion[number, number], atol=1e-6)


def test_a_row_of_stage_0_per_threshold_and_score(drawn):
    rows = drawn("evidence0")
    keys = ("run", "tap", "windows", "threshold", "score")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    assert {row["windows"] for row in rows} == {"1", "1+7+19"}
    assert {row["score"] for row in rows} >= {"confidence", "softmax_prob", "sigmoid"}
    all_pixels = [row for row in rows if row["threshold"] == "0.0"]
    assert {row["coverage"] for row in all_pixels} == {"1.0"}
    # Pseudo-labels are those of the run, whatever weighs them.
    for name in ("baseline", "mpmc"):
        assert len({row["accuracy"] for row in all_pixels if row["run"] == name}) == 1


def test_labels_do_not_choose_where_the_crops_of_stage_0_lie(trained):
    run = load_run(trained.mpmc)
    ids = str(trained.mpmc / "splits" / "unlabeled.txt")

    def first():
        return next(open_screen(run, ["layer1"], "lite").crops(ids))

    expected = first().image
    # Class 1 would be at the center of every crop.
    run.config.imbalance.crop_probability = 1.0
    run.config.imbalance.crop_classes = (1,)
    np.testing.assert_array_equal(first().image, expected)


def test_every_valid_patch_is_in_a_bin_of_table4(trained, drawn):
    rows = drawn("table4")
    assert [row["hamming_accuracy"] for row in rows][::9] == ["90-100", "0-10"]
    share = sum(float(row["percent_of_patches"]) for row in rows)
    np.testing.assert_allclose(share, 100)
    histogram = load_run(trained.mpmc).evaluate("val").histogram
    assert sum(int(row["patches"]) for row in rows) == histogram[:, 0].sum()


def test_the_same_command_draws_the_same_files(trained, tmp_path):
    how = ("mpmc", {"pixels": 5}, "x")
    for name in "ab":
        draw(trained, "figure5", tmp_path / name, how)
    for kind in ("png", "svg", "csv"):
        first, again = (tmp_path / x / f"figure5.{kind}" for x in "ab")
        assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("command", "runs", "message"),
    [
        ("figure1", "baseline", "baseline was trained without a patch classifier"),
        ("panels", "baseline", "baseline was trained without a patch classifier"),
        ("pseudo_labels", "baseline", "without a patch classifier (mpmc=off)"),
        ("supp_figure1", "baseline", "without a patch classifier (mpmc=off)"),
        ("table4", "mpmc baseline", "without a patch classifier (mpmc=off)"),
        ("table4", "mpmc", "table4 compares two runs, the baseline and MPMC; 1 given"),
        ("figure1", "baseline mpmc", "figure1 shows one run; 2 are given"),
        ("figure1 patches=0", "mpmc", "patches=0: at least 1"),
        ("evidence0 steps=0", "mpmc", "steps=0: at least 1"),
        ("evidence0 taps=layer9", "mpmc", "tap 'layer9' of"),
        ("evidence0", "mpmc", "no tap has patches of 2% to 20%"),
        ("figure3 images=0", "mpmc", "images=0: at least 1"),
        ("figure3 ids=gone", "mpmc", "no labeled image 'gone'; the first ones are"),
        ("figure4 classes=rod", "mpmc", "'rod' is unknown; valid: sky, building"),
        ("figure5 classes=cat+car", "mpmc", "'cat' is unknown; valid: sky, building"),
        ("figure5 pixels=0", "mpmc", "pixels=0: at least 1"),
        ("reliability bins=0", "mpmc", "bins=0: at least 1"),
        ("supp_figure1 --checkpoint=2", "mpmc", "--config.train.keep=N"),
        ("confusion", "gone", "gone holds no run"),
        ("supp_figure1", "gone", "gone holds no run"),
    ],
)
def test_a_mistake_is_one_line(trained, tmp_path, command, runs, message):
    name, *rest = command.split()
    flags = [x if x.startswith("--") else f"--options={x}" for x in rest]
    paths = [str(trained.place / run) for run in runs.split()]
    with pytest.raises(SystemExit) as stopped:
        experiments.main(
            [f"--name={name}", f"--output={tmp_path / 'out'}", *flags, *paths]
        )
    error = str(stopped.value.code)
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_runs_of_different_data_are_refused():
    def run(name, dataset, fingerprint):
        facts = types.SimpleNamespace(dataset=dataset, fingerprint=fingerprint)
        return types.SimpleNamespace(
            name=name, restored=types.SimpleNamespace(facts=facts)
        )

    with pytest.raises(ValueError) as raised:
        open_common([run("a", "voc", "0" * 64), run("b", "camvid", "1" * 64)])
    assert str(raised.value) == (
        "a was trained on voc (00000000) and b on camvid (11111111); give runs of one "
        "data set"
    )
