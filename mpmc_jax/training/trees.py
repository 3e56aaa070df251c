"""Operations on all arrays of a state at once, in few kernels.

A state has hundreds of small arrays. On a GPU each would be a kernel of its own, or two
for a reduction.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mpmc_jax.models.platform import target_platform
from mpmc_jax.types import Array, PyTree

# Vectors in a joined copy; a kernel takes some hundred arrays.
_JOINED = 64


def tree_where(condition: Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """Returns the tree `if_true` if the () bool `condition` holds, else `if_false`.

    A GPU's program has a kernel per leaf, except that XLA joins those of equally long
    vectors that read a common array. So vectors are chosen by a vector of conditions.
    """
    vectors = [leaf for leaf in jax.tree.leaves(if_true) if leaf.ndim == 1]
    longest = max((len(leaf) for leaf in vectors), default=1)
    repeated = jax.lax.optimization_barrier(jnp.full(longest, condition))

    def of_leaf(a: Array, b: Array) -> Array:
        return jnp.where(repeated[: len(a)] if a.ndim == 1 else condition, a, b)

    return jax.tree.map(of_leaf, if_true, if_false)


def with_joined_vectors(tree: PyTree) -> PyTree:
    """Reads the vectors of a tree from joined copies of them, on GPUs.

    No value changes; only GPUs get faster. XLA updates equally long vectors in place,
    in one kernel. Each vector whose old value that kernel reads as well would first be
    copied, by a kernel of its own.
    """
    if target_platform() != "gpu":
        return tree
    leaves, structure = jax.tree.flatten(tree)
    by_dtype: dict[jnp.dtype, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 1:
            by_dtype.setdefault(leaf.dtype, []).append(i)
    for places in by_dtype.values():
        for first in range(0, len(places), _JOINED):
            some = places[first : first + _JOINED]
            vectors = [leaves[i] for i in some]
            ends = list(itertools.accumulate(map(len, vectors)))
            joined = jax.lax.optimization_barrier(jnp.concatenate(vectors))
            for i, part in zip(some, jnp.split(joined, ends[:-1]), strict=True):
                leaves[i] = part
    return jax.tree.unflatten(structure, leaves)


def norm(tree: PyTree) -> Array:
    """Computes the norm of all numbers of a tree."""
    parts = _by_shape(tree, jnp.square, jnp.sum, jnp.add)
    return jnp.sqrt(sum(jnp.sum(part) for part in parts))


def all_finite(tree: PyTree) -> Array:
    """Whether every floating-point number of a tree is finite: () bool."""
    parts = _by_shape(tree, jnp.isfinite, jnp.all, jnp.logical_and)
    return jnp.stack([part.all() for part in parts]).all() if parts else jnp.array(True)


def _by_shape(
    tree: PyTree,
    each: Callable[[Array], Array],
    reduce: Callable[..., Array],
    combine: Callable[[Array, Array], Array],
) -> list[Array]:
    """Reduces the floating-point leaves of a tree to few arrays, one per shape.

    Leaves of more than one axis are reduced along the last one, and results of the same
    shape are combined element by element. On a GPU a whole reduction per leaf would be
    two kernels per leaf.
    """
    parts: dict[tuple[int, ...], Array] = {}
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        part = each(leaf)
        if leaf.ndim > 1:
            part = reduce(part, axis=-1)
        known = parts.get(part.shape)
        parts[part.shape] = part if known is None else combine(known, part)
    return list(parts.values())
