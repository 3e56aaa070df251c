"""Sums over devices: NumPy's over one, two and four of them, and none of one device."""

import chex
import jax
import numpy as np
import pytest

from mpmc_jax import distributed
from mpmc_jax.training.config import AXIS

FUNCTIONS = {
    distributed.total: lambda x: np.broadcast_to(x.sum(0), x.shape),
    distributed.mean: lambda x: np.broadcast_to(x.mean(0), x.shape),
    distributed.gathered: lambda x: np.broadcast_to(
        np.concatenate(x), (len(x), x.shape[0] * x.shape[1], *x.shape[2:])
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_over_devices(function, count):
    x = np.random.default_rng(count).normal(size=(count, 3, 5)).astype(np.float32)
    mapped = jax.pmap(lambda x: function({"x": x}, AXIS), axis_name=AXIS)
    chex.assert_trees_all_close(mapped(x), {"x": FUNCTIONS[function](x)}, rtol=1e-6)
    assert ("all_" in mapped.lower(x).as_text()) == (count > 1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_nothing_is_mapped(function):
    x = np.arange(6.0).reshape(2, 3)
    assert function(x, None) is x
    assert distributed.count(None) == 1
