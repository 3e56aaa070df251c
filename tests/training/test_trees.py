"""Operations on all arrays of a state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpmc_jax.models.platform import compiled_for
from mpmc_jax.training.trees import norm, tree_where, with_joined_vectors


def test_the_norm_is_that_of_all_numbers():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, 3, 4, 5), (3, 3, 2, 5), (5,), ()]
    tree = [jax.random.normal(*each) for each in zip(keys, shapes, strict=True)]
    np.testing.assert_allclose(norm(tree), optax.tree.norm(tree), rtol=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_a_tree_is_chosen_as_a_whole(first):
    trees = [
        {
            "vector": i + jnp.arange(3),
            "short": jnp.full(2, i),
            "map": jnp.full((2, 2), i),
        }
        for i in range(2)
    ]
    chosen = tree_where(jnp.bool_(first), *trees)
    chex.assert_trees_all_equal(chosen, trees[0 if first else 1])


def test_joined_vectors_are_those_of_the_tree():
    tree = {
        "vectors": [jnp.arange(i + 1.0) for i in range(70)],
        "integers": jnp.arange(3),
        "map": jnp.ones((2, 2)),
        "none": None,
    }
    with compiled_for("gpu"):
        chex.assert_trees_all_equal(jax.jit(with_joined_vectors)(tree), tree)
