"""Which pixels U2PL contrasts: as its released code does, and as its paper says.

Released: a scatter writes the labels of every image of a stream into its first image
only, so that one image a stream takes part, under the union of all labels; and a key of
a class is looked for where the class is, which for labeled images is never.

Corrected: every image takes part under its own labels; a key of a class is looked for
where the class is not (labeled images) or unlikely (unlabeled ones); a prototype is
the mean of the possible anchors.

Source: U2PL's u2pl/utils/loss_helper.py and utils.py; Wang et al., CVPR 2022, 3.3.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a pixel must meet.

    Attributes:
      anchor_above, key_below: bounds of the class's probability (delta_p, delta_n).
      low_rank, high_rank: an unlabeled key's class has a rank in [low, high), a
        labeled one's below low.
    """

    anchor_above: float
    key_below: float
    low_rank: int
    high_rank: int


def ranks(probability: Array) -> Array:
    """Place of every class in a pixel's falling order, from 0; ties by number."""
    one, other = probability[..., None], probability[..., None, :]
    number = jnp.arange(probability.shape[-1])
    earlier = number[None] < number[:, None]
    tied = (other == one) & earlier.reshape((1,) * (one.ndim - 2) + earlier.shape)
    return jnp.sum((other > one) | tied, axis=-1, dtype=jnp.int32)


def released_items(batch_bhwd: Array) -> Array:
    """The rows that take part: all pixels of the first labeled and unlabeled image.

    Args:
      batch_bhwd: maps of the labeled, then of as many unlabeled images.

    Returns:
      (2hw, ...), row after row of the one, then of the other.
    """
    first = jnp.stack([batch_bhwd[0], batch_bhwd[len(batch_bhwd) // 2]])
    return all_items(first)


def all_items(batch_bhwd: Array) -> Array:
    """The rows that take part, corrected: all pixels of all images, (bhw, ...)."""
    return batch_bhwd.reshape(-1, *batch_bhwd.shape[3:])


def released_sets(
    label_bhw: Array,
    pseudo_bhw: Array,
    probability_bhwc: Array,
    low_bhw: Array,
    high_bhw: Array,
    bounds: Bounds,
) -> Sets:
    """The released code's choice among the rows of `released_items`.

    Args:
      label_bhw: labels of the labeled images, 255 void.
      pseudo_bhw: pseudo-labels of as many unlabeled ones.
      probability_bhwc: the teacher's, labeled images first.
      low_bhw, high_bhw: bool, pixels of low and of high entropy, labeled first.
      bounds: see there.
    """
    num_classes = probability_bhwc.shape[-1]

    def union(label_bhw: Array) -> Array:
        # Void is written as class 0, and taken back where the first image is void.
        known_bhw = jnp.where(label_bhw == IGNORE_LABEL, 0, label_bhw)
        hot_bhwc = jax.nn.one_hot(known_bhw, num_classes, dtype=jnp.bool_)
        void_hw = label_bhw[0] == IGNORE_LABEL
        return jnp.any(hot_bhwc, axis=0) & ~void_hw[..., None]

    hot_nc = jnp.stack([union(label_bhw), union(pseudo_bhw)]).reshape(-1, num_classes)
    p_nc, low_n, high_n = map(released_items, (probability_bhwc, low_bhw, high_bhw))
    unlabeled_n = jnp.arange(len(p_nc)) >= len(p_nc) // 2
    # A labeled key would have to be of the class and not of it.
    allowed_nc = hot_nc & unlabeled_n[:, None]
    return _sets(hot_nc, p_nc, low_n, high_n, unlabeled_n, allowed_nc, bounds)


def corrected_sets(
    label_bhw: Array,
    pseudo_bhw: Array,
    probability_bhwc: Array,
    low_bhw: Array,
    high_bhw: Array,
    bounds: Bounds,
) -> Sets:
    """The paper's choice among the rows of `all_items`; arguments as released."""
    label_n = all_items(jnp.concatenate([label_bhw, pseudo_bhw]))
    hot_nc = jax.nn.one_hot(label_n, probability_bhwc.shape[-1], dtype=jnp.bool_)
    p_nc, low_n, high_n = map(all_items, (probability_bhwc, low_bhw, high_bhw))
    unlabeled_n = jnp.arange(len(p_nc)) >= len(p_nc) // 2
    # An unlabeled pixel's own pseudo-label does not matter.
    allowed_nc = ~hot_nc | unlabeled_n[:, None]
    sets = _sets(hot_nc, p_nc, low_n, high_n, unlabeled_n, allowed_nc, bounds)
    # The prototype is the mean of what may be an anchor.
    return sets.replace(prototype=sets.anchor)


def _sets(
    hot_nc: Array,
    p_nc: Array,
    low_n: Array,
    high_n: Array,
    unlabeled_n: Array,
    allowed_nc: Array,
    bounds: Bounds,
) -> Sets:
    """`allowed_nc` says where a class's keys may lie at all."""
    reliable_nc = hot_nc & low_n[:, None]
    rank_nc = ranks(p_nc)
    middle_nc = (rank_nc >= bounds.low_rank) & (rank_nc < bounds.high_rank)
    far_nc = jnp.where(unlabeled_n[:, None], middle_nc, rank_nc < bounds.low_rank)
    unlikely_nc = p_nc < bounds.key_below
    return Sets(
        prototype=reliable_nc,
        anchor=reliable_nc & (p_nc > bounds.anchor_above),
        key=allowed_nc & high_n[:, None] & far_nc & unlikely_nc,
    )


def nearest(map_bhw: Array, rows: int, columns: int) -> Array:
    """The pixel floor(i * length / size) for place i, as PyTorch's nearest."""
    height, width = map_bhw.shape[1:]
    row = jnp.arange(rows) * height // rows
    column = jnp.arange(columns) * width // columns
    return map_bhw[:, row[:, None], column[None]]
