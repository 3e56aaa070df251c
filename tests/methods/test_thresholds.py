"""Thresholds of confidence by class, for every method that has a threshold."""

import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.methods import pseudo_labels
from tests.support import tiny

CONFIDENCE = jnp.array([[[0.5, 0.7, 0.9], [0.7, 0.7, 1.0]]])
LABEL = jnp.array([[[0, 1, 2], [2, 0, 255]]])


def test_each_pixel_is_held_to_the_threshold_of_its_class():
    found = pseudo_labels.is_confident(CONFIDENCE, LABEL, (0.7, 0.6, 0.9))
    np.testing.assert_array_equal(found, [[[0, 1, 1], [0, 1, 1]]])
    same = pseudo_labels.is_confident(CONFIDENCE, LABEL, (0.7, 0.7, 0.7))
    one = pseudo_labels.is_confident(CONFIDENCE, LABEL, 0.7)
    np.testing.assert_array_equal(same, one)


METHODS = ["mean_teacher", "unimatch", "unimatch_v2", "fixmatch", "augseg", "ael"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_thresholds_by_class(method):
    by_class = (0.9, 0.5, 0.5, 0.7)
    config = tiny.config(f"method={method}", imbalance__thresholds=by_class)
    assert tiny.setup(config).step.method.threshold == by_class
    tiny.check_trace(config)


@pytest.mark.full
def test_equal_thresholds_are_one_threshold():
    """A step, which a threshold that nothing reaches changes."""
    argument, some = "method=augseg", 0.26  # reached by some pixels
    _, (one,) = tiny.run(tiny.config(argument, method__threshold=some), 1)
    _, (equal,) = tiny.run(tiny.config(argument, imbalance__thresholds=(some,) * 4), 1)
    assert equal.values == one.values
    assert 0 < one.values["confident"] < 1
    unequal = tiny.config(argument, imbalance__thresholds=(some, 1.0, some, 1.0))
    _, (other,) = tiny.run(unequal, 1)
    assert other.values["confident"] < one.values["confident"]


@pytest.mark.parametrize(
    ("method", "thresholds", "message"),
    [
        ("unimatch", (0.9, 0.9), r"give 4 numbers in \[0, 1\], one per class"),
        ("unimatch", (0.9, 0.9, 0.9, 1.5), r"give 4 numbers in \[0, 1\]"),
        ("unimatch", ("0.9",) * 4, r"give 4 numbers in \[0, 1\]"),
        ("cps", (0.9,) * 4, "cps has no threshold of confidence; leave it at"),
        ("u2pl", (0.9,) * 4, "u2pl has no threshold"),
    ],
)
def test_thresholds_that_fit_nothing_are_refused(method, thresholds, message):
    config = tiny.config(f"method={method}", imbalance__thresholds=thresholds)
    with pytest.raises(ValueError, match=message):
        tiny.setup(config)
