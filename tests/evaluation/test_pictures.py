"""An evaluation as a table, and pictures of classes and values."""

import numpy as np
import pytest

from mpmc_jax.evaluation import metrics, pictures
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.table import format_table

NAMES = ("dark", "bright")
PALETTE = ((10, 20, 30), (200, 100, 50))


def test_table_marks_absent_classes_and_compares_with_the_constant():
    histogram = np.zeros((2, 2, metrics.BINS), int)
    histogram[0, :, 10], histogram[1, 0, -10] = 30, 10
    result = EvalResult(
        confusion=np.array([[4, 0], [0, 0]]),
        num_images=2,
        pad_to=0,
        seconds=1.0,
        programs=1,
        histogram=histogram,
    )
    lines = format_table(result, NAMES).splitlines()
    assert lines[1].split() == ["dark", "100.00", "100.00", "4"]
    assert lines[2].split() == ["bright", "-", "-", "0"]
    assert "average precision: 100.00 (best constant prediction 25.00)" in lines[5]
    assert "Hamming accuracy: 100.00 (best constant prediction 87.50)" in lines[6]
    assert "own size" in lines[7]


def test_void_and_unknown_indices_are_black():
    index = np.array([[0, 1, 2, 255]], np.uint8)
    expected = [[*PALETTE, (0, 0, 0), (0, 0, 0)]]
    np.testing.assert_array_equal(pictures.colorize(index, PALETTE), expected)


def test_panel_sets_pictures_where_they_belong():
    red, blue = (np.full((10, 12, 3), c, np.uint8) for c in ((255, 0, 0), (0, 0, 255)))
    gray = np.full((10, 12, 1), 77, np.uint8)
    picture = np.asarray(pictures.panel([[red, gray], [blue, red]], ["one", "two"]))
    assert (picture[16:26, 4:16] == red).all()
    assert (picture[16:26, 20:32] == 77).all()
    assert (picture[30:40, 4:16] == blue).all()
    assert (picture[:16] < 128).any()
    with pytest.raises(ValueError, match="2 per row"):
        pictures.panel([[red, gray], [blue]], ["one", "two"])


def test_heat_map_spans_black_to_white():
    np.testing.assert_array_equal(
        pictures.heat_map(np.array([[0.1, 0.3], [0.2, 0.1]]))[..., 0],
        [[0, 255], [128, 0]],
    )
    assert pictures.heat_map(np.full((2, 2), 0.5)).max() == 0
