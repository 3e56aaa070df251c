"""The numbers of stage 0, from arrays."""

import numpy as np
import pytest

from configs import acdc
from mpmc_jax.analysis import evidence0
from mpmc_jax.experiments.build import model_config
from mpmc_jax.experiments.patch_screen import open_screen
from mpmc_jax.pixels import PixelFormat
from tests.support.bright_run import bright_run


@pytest.fixture
def pixels():
    """Eight pseudo-labels; the last three are wrong, and one of them is not sure."""
    return {
        "right": np.array([True] * 5 + [False] * 3),
        "confidence": np.array([0.99, 0.97, 0.8, 0.6, 0.5, 0.96, 0.96, 0.3]),
    }


def head(gamma, oracle):
    return {
        "oracle": np.array(oracle, float),
        "softmax_prob": np.array(gamma, float),
        "hamming": np.array([0.5]),
    }


def test_removed_weight_is_relative_to_the_mean():
    right = np.array([True, True, False, False])
    assert evidence0.removed_share(right, np.full(4, 0.3)) == pytest.approx(0)
    assert evidence0.removed_share(right, np.array([1, 1, 0, 0])) == 1
    assert evidence0.removed_share(right, np.array([0, 0, 1, 1])) == -1
    # Mean 0.5; the wrong ones weigh 0.25.
    found = evidence0.removed_share(right, np.array([1, 0.5, 0.5, 0]))
    assert found == pytest.approx(0.5)
    assert evidence0.removed_share(right, np.zeros(4)) is None
    assert evidence0.removed_share(np.ones(4, bool), np.ones(4)) is None
    assert evidence0.removed_share(np.ones(0, bool), np.ones(0)) is None


def test_runs_of_every_method_are_screened():
    pixels = PixelFormat(1, dtype="float32", mean=(0.0,), std=(1.0,))
    names, palette = ("a", "b", "c", "d"), ((0, 0, 0),) * 4
    for method in ("mean_teacher", "unimatch", "ael"):
        config = acdc.get_config(f"method={method},mpmc=off")
        config.data.crop = 96
        model = model_config(config, 4, 1)
        run = bright_run(names, palette, pixels, config=config, model=model)
        screen = open_screen(run, [], "lite")
        assert {plugin.tap for plugin in screen.plugins} == {"stage2", "stage3"}
        assert {plugin.windows for plugin in screen.plugins} == {(1,), (1, 7, 19)}


def test_rows_are_of_the_confident_pixels(pixels):
    gamma = [0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.1, 0.1]
    found = evidence0.rows_of_head(pixels, head(gamma, [1, 1, 1, 1, 1, 1, 0, 1]))
    by = {(row["threshold"], row["score"]): row for row in found}
    assert set(by) == {
        (threshold, score)
        for threshold in evidence0.THRESHOLDS
        for score in ("confidence", "softmax_prob")
    }
    everything = by[0.0, "softmax_prob"]
    assert everything["coverage"] == 1 and everything["accuracy"] == 5 / 8
    assert everything["oracle"] == pytest.approx(1 / 3)
    # Of 15 pairs, five are tied and ten are in order.
    assert everything["auroc"] == pytest.approx(12.5 / 15)
    sure = by[0.95, "softmax_prob"]
    assert (sure["coverage"], sure["accuracy"], sure["oracle"]) == (0.5, 0.5, 0.5)
    assert sure["auroc"] == pytest.approx(0.75)
    assert sure["removed"] == pytest.approx(1 - 0.25 / 0.325)
    assert by[0.95, "confidence"]["auroc"] == 1


@pytest.mark.parametrize(
    "oracle, auroc, expected",
    [(0.2, 0.7, True), (0.05, 0.7, False), (0.2, 0.6, False), (None, 0.7, False)],
)
def test_a_geometry_goes_on_by_its_oracle_and_its_gamma(oracle, auroc, expected):
    rows = [
        {"score": "confidence", "oracle": oracle, "auroc": 0.99},
        {"score": "sigmoid", "oracle": oracle, "auroc": auroc},
        {"score": "softmax_prob", "oracle": oracle, "auroc": None},
    ]
    assert evidence0.goes_on(rows) is expected


def test_the_page_has_a_line_per_geometry_and_threshold(pixels):
    gamma = [0.4] * 6 + [0.1] * 2
    geometry = {"run": "a", "step": 3, "tap": "layer1", "windows": "1", "field": 7}
    geometry |= {"share_of_crop": 0.05, "hamming": 0.9}
    rows = [
        {**geometry, "windows": windows, **row}
        for windows in ("1", "1+7+19")
        for row in evidence0.rows_of_head(pixels, head(gamma, [1] * 6 + [0] * 2))
    ]
    text = evidence0.markdown(rows)
    lines = [line for line in text.splitlines() if line.startswith("| a (3) |")]
    assert len(lines) == 6
    assert "| layer1 | 1 | 7 | 5.0 | 0.900 | 0.0 | 1.000 | 0.625 | 66.7% | " in lines[0]
    assert lines[0].endswith("| yes |")
