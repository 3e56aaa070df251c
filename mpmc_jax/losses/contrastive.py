"""U2PL's pixel contrast: anchors, prototypes, and banks of negatives.

All shapes are static. The banks of all classes are concatenated in one array; each is
a ring buffer with its own capacity, so that a large bank for one class does not
enlarge the others.

Source: Wang et al., CVPR 2022, section 3.3; its released compute_contra_memobank_loss.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mpmc_jax.losses.sampling import nth_true, pick
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Array

_EPSILON = 1e-8  # smallest product of norms in a cosine, as in PyTorch


class Bank(struct.PyTreeNode):
    """The memory bank: the negatives of all classes.

    Attributes:
      keys: (sum of capacities, d), the negatives.
      pointer: (c,) int32, position in the ring where the next negative of a class goes.
      size: (c,) int32, number of negatives in each ring.
    """

    keys: Array
    pointer: Array
    size: Array


@dataclasses.dataclass(frozen=True)
class Rings:
    """The layout of the rings of all classes in `Bank.keys`.

    Attributes:
      capacities: largest number of negatives, per class.
    """

    capacities: tuple[int, ...]

    @property
    def starts(self) -> np.ndarray:
        """The first row of each ring, (c,) int32."""
        return (np.cumsum(self.capacities) - self.capacities).astype(np.int32)

    def empty(self, channels: int, dtype: str = "float32") -> Bank:
        """Returns an empty bank."""
        none = jnp.zeros(len(self.capacities), jnp.int32)
        keys = jnp.zeros((sum(self.capacities), channels), dtype)
        return Bank(keys, none, none)

    def push(self, bank: Bank, features_nd: Array, chosen_nc: Array) -> Bank:
        """Appends to every class's ring the features that were chosen for it.

        The oldest negatives are overwritten first; if more new ones come than fit, the
        last ones are kept.
        """
        return self.push_each(bank, lambda label: (features_nd, chosen_nc[:, label]))

    def push_each(
        self, bank: Bank, choose: Callable[[Array], tuple[Array, Array]]
    ) -> Bank:
        """Like `push`; `choose` maps a class to its features (n,d), chosen (n,)."""

        def one(keys: Array, ring: tuple[Array, ...]):
            label, start, capacity, pointer, size = ring
            features_nd, chosen_n = choose(label)
            place_n = jnp.cumsum(chosen_n, dtype=jnp.int32) - 1
            count = jnp.sum(chosen_n, dtype=jnp.int32)
            fits_n = chosen_n & (place_n >= count - capacity)
            row_n = start + (pointer + place_n) % capacity
            row_n = jnp.where(fits_n, row_n, len(keys))  # out of range: dropped
            keys = keys.at[row_n].set(features_nd.astype(keys.dtype), mode="drop")
            advanced = (pointer + count) % capacity
            return keys, (advanced, jnp.minimum(size + count, capacity))

        capacities = jnp.asarray(self.capacities, jnp.int32)
        labels = jnp.arange(len(self.capacities), dtype=jnp.int32)
        starts = jnp.asarray(self.starts)
        rings = (labels, starts, capacities, bank.pointer, bank.size)
        keys, (pointer, size) = jax.lax.scan(one, bank.keys, rings)
        return Bank(keys, pointer, size)

    def rows(self, bank: Bank, label: Array, order: Array) -> Array:
        """Rows of `bank.keys` with a class's `order`-th oldest negatives, from 0."""
        capacity = jnp.asarray(self.capacities, jnp.int32)[label]
        oldest = bank.pointer[label] - bank.size[label]
        return jnp.asarray(self.starts)[label] + (oldest + order) % capacity


class Draws(struct.PyTreeNode):
    """Random numbers in [0, 1) that choose the anchors and negatives of each term.

    Attributes:
      anchor: (c,m), one per anchor of a term.
      negative: (c,m,n), one per negative of an anchor.
    """

    anchor: Array
    negative: Array


def prototypes(features_nd: Array, chosen_nc: Array) -> Array:
    """Mean feature of each class's chosen pixels, (c,d); 0 where there are none."""
    weight_nc = chosen_nc.astype(features_nd.dtype)
    summed_cd = jnp.einsum("nc,nd->cd", weight_nc, features_nd, precision="highest")
    return summed_cd / jnp.maximum(weight_nc.sum(0), 1)[:, None]


def info_nce(
    features_nd: Array,
    anchors_nc: Array,
    prototypes_cd: Array,
    present_c: Array,
    rings: Rings,
    bank: Bank,
    draws: Draws,
    *,
    temperature: float,
    released_indexing: bool,
) -> Array:
    """The InfoNCE loss of pixels, averaged over the present classes.

    Args:
      features_nd: the student's feature of every pixel; only these receive gradient.
      anchors_nc: bool, the pixels that may be anchors of a class.
      prototypes_cd: the positive of each class's anchors.
      present_c: bool, the classes that count.
      rings, bank: the negatives, including this step's.
      draws: uniform numbers; each picks an anchor or a negative, with replacement.
      temperature: divides the cosines.
      released_indexing: reproduces an indexing bug of the released code: term k uses
        the anchors and the prototype of class k, but negatives of the k-th present
        class. Otherwise all three are those of the k-th present class.

    Returns:
      A scalar. A term without anchors or without negatives is 0, but counts in the
      mean; with fewer than two classes present the loss is 0.
    """
    num_classes = len(rings.capacities)
    count = jnp.sum(present_c, dtype=jnp.int32)
    # Present classes first; both present and absent ones in ascending order.
    ranked = jnp.argsort(~present_c, stable=True)
    prototypes_cd = jax.lax.stop_gradient(prototypes_cd)

    def term(k: Array, anchor_m: Array, negative_mn: Array) -> Array:
        other = ranked[k]
        own = k if released_indexing else other
        chosen_n = anchors_nc[:, own]
        anchors = jnp.sum(chosen_n, dtype=jnp.int32)
        size = bank.size[other]
        pixel_m = nth_true(chosen_n, pick(anchor_m, anchors))
        pixel_m = jnp.minimum(pixel_m, len(features_nd) - 1)
        anchor_md = at_least_float32(features_nd[pixel_m])
        row_mn = rings.rows(bank, other, pick(negative_mn, size))
        negative_mnd = bank.keys[row_mn].astype(anchor_md.dtype)
        positive_m = _cosine(anchor_md, prototypes_cd[own][None])
        negative_mn = _cosine(anchor_md[:, None], negative_mnd)
        cosines = jnp.concatenate([positive_m[:, None], negative_mn], axis=1)
        logits = cosines / temperature
        loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])
        return jnp.where((k < count) & (anchors > 0) & (size > 0), loss, 0)

    # The gathered negatives are large, so the backward pass gathers them again.
    each = jax.lax.map(
        lambda one: jax.checkpoint(term)(*one),
        (jnp.arange(num_classes), draws.anchor, draws.negative),
    )
    return jnp.where(count > 1, jnp.sum(each) / jnp.maximum(count, 1), 0)


def _cosine(a: Array, b: Array) -> Array:
    """Cosine of the angle between the last axes, which broadcast."""
    product = jnp.sum(a * b, axis=-1)
    return product / jnp.maximum(_norm(a) * _norm(b), _EPSILON)


def _norm(x: Array) -> Array:
    """The Euclidean norm, with a gradient of 0 (not NaN) at the zero vector."""
    square = jnp.sum(x * x, axis=-1)
    return jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)
