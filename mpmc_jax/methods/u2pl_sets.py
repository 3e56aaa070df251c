"""Which pixels U2PL contrasts, as its released code chooses them.

Released (`released_sets`): a scatter writes the labels of every image of a stream into
its first image only, so that one image a stream takes part, under the union of all
labels; and keys of labelled images are never found, as they are looked for where the
class is and is not at once.

Source: U2PL's u2pl/utils/loss_helper.py and utils.py; Wang et al., CVPR 2022, 3.3.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.types import IGNORE_LABEL, Array


class Sets(struct.PyTreeNode):
    """Pixels by their part in the contrast, for every class: (n,c) bool each.

    Attributes:
      prototype: reliable pixels of the class; their mean is its prototype.
      anchor: those of them that the teacher holds likely enough.
      key: negatives to put into the class's bank.
    """

    prototype: Array
    anchor: Array
    key: Array

    @property
    def present(self) -> Array:
        """(c,) bool, the classes that have a reliable pixel."""
        return jnp.any(self.prototype, axis=0)


def ranks(probability: Array) -> Array:
    """Place of every class in a pixel's falling order, from 0; ties by number."""
    order = jnp.argsort(-probability, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True)


def released_items(batch_bhwd: Array) -> Array:
    """The rows that take part: all pixels of the first labelled and unlabelled image.

    Args:
      batch_bhwd: maps of the labelled, then of as many unlabelled images.

    Returns:
      (2hw, ...), row after row of the one, then of the other.
    """
    first = jnp.stack([batch_bhwd[0], batch_bhwd[len(batch_bhwd) // 2]])
    return first.reshape(-1, *batch_bhwd.shape[3:])


def released_sets(
    label_bhw: Array,
    pseudo_bhw: Array,
    probability_bhwc: Array,
    low_bhw: Array,
    high_bhw: Array,
    *,
    anchor_above: float,
    key_below: float,
    low_rank: int,
    high_rank: int,
) -> Sets:
    """The released code's choice among the rows of `released_items`.

    Args:
      label_bhw: labels of the labelled images, 255 void.
      pseudo_bhw: pseudo-labels of as many unlabelled ones.
      probability_bhwc: the teacher's, labelled images first.
      low_bhw, high_bhw: bool, pixels of low and of high entropy, labelled first.
      anchor_above, key_below: bounds of the class's probability (delta_p, delta_n).
      low_rank, high_rank: an unlabelled key's class has a rank in [low, high).
    """
    num_classes = probability_bhwc.shape[-1]

    def union(label_bhw: Array) -> Array:
        # Void is written as class 0, and taken back where the first image is void.
        known_bhw = jnp.where(label_bhw == IGNORE_LABEL, 0, label_bhw)
        hot_bhwc = jax.nn.one_hot(known_bhw, num_classes, dtype=jnp.bool_)
        void_hw = label_bhw[0] == IGNORE_LABEL
        return jnp.any(hot_bhwc, axis=0) & ~void_hw[..., None]

    both = jnp.stack([union(label_bhw), union(pseudo_bhw)])
    hot_nc = both.reshape(-1, num_classes)
    p_nc = released_items(probability_bhwc)
    reliable_nc = hot_nc & released_items(low_bhw)[:, None]
    rank_nc = ranks(p_nc)
    unlabeled_n = jnp.arange(len(p_nc)) >= len(p_nc) // 2
    far_nc = jnp.where(
        unlabeled_n[:, None],
        (rank_nc >= low_rank) & (rank_nc < high_rank),
        (rank_nc < low_rank) & ~hot_nc,
    )
    key_nc = hot_nc & released_items(high_bhw)[:, None] & far_nc & (p_nc < key_below)
    return Sets(
        prototype=reliable_nc, anchor=reliable_nc & (p_nc > anchor_above), key=key_nc
    )
