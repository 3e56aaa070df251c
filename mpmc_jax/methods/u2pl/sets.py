"""The pixels that U2PL contrasts, by its released code and by its paper.

Released: a scatter writes the labels of all images of a stream (labeled or unlabeled)
into the first image, so that only one image per stream takes part, with the union of
all labels. Negatives of a class are searched only where the class is, so labeled images
have none.

Corrected: every image takes part with its own labels. Negatives of a class are searched
where the class is not (labeled images) or is improbable (unlabeled images). A
prototype is the mean of the possible anchors.

Source: U2PL's u2pl/utils/loss_helper.py and utils.py; Wang et al., CVPR 2022, 3.3.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.types import IGNORE_LABEL, Array


class Sets(struct.PyTreeNode):
    """The pixels that serve as prototype, anchor or negative of each class: (n,c) bool.

    Attributes:
      prototype: reliable pixels of the class, whose mean is its prototype.
      anchor: reliable pixels where the teacher's probability of the class is high.
      negative: pixels to add to the class's bank.
    """

    prototype: Array
    anchor: Array
    negative: Array

    @property
    def present(self) -> Array:
        """The classes that have a reliable pixel, (c,) bool."""
        return jnp.any(self.prototype, axis=0)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The bounds of probability and rank for anchors and negatives of a class.

    Attributes:
      anchor_above: an anchor's probability of the class exceeds this (delta_p).
      key_below: a negative's probability of the class is below this (delta_n).
      low_rank, high_rank: among a negative's probabilities, the class has a rank (from
        0) in [low_rank, high_rank) in unlabeled images, and below low_rank in labeled
        ones.
    """

    anchor_above: float
    key_below: float
    low_rank: int
    high_rank: int


def ranks(probability: Array) -> Array:
    """Rank of every class in a pixel's descending order, from 0.

    Ties are ranked by class index.
    """
    one, other = probability[..., None], probability[..., None, :]
    index = jnp.arange(probability.shape[-1])
    earlier = index[None] < index[:, None]
    tied = (other == one) & earlier.reshape((1,) * (one.ndim - 2) + earlier.shape)
    return jnp.sum((other > one) | tied, axis=-1, dtype=jnp.int32)


def released_pixels(batch_bhwd: Array) -> Array:
    """The released code's pixels: those of the first labeled and unlabeled image.

    Args:
      batch_bhwd: maps of the labeled images, then of as many unlabeled ones.

    Returns:
      (2hw, ...), the pixels of the labeled image, then those of the unlabeled one.
    """
    first = jnp.stack([batch_bhwd[0], batch_bhwd[len(batch_bhwd) // 2]])
    return all_pixels(first)


def all_pixels(batch_bhwd: Array) -> Array:
    """The corrected form's pixels: those of all images, (bhw, ...)."""
    return batch_bhwd.reshape(-1, *batch_bhwd.shape[3:])


def released_sets(
    label_bhw: Array,
    pseudo_bhw: Array,
    probability_bhwc: Array,
    low_bhw: Array,
    high_bhw: Array,
    bounds: Bounds,
) -> Sets:
    """The released code's choice among the pixels of `released_pixels`.

    Args:
      label_bhw: labels of the labeled images, 255 void.
      pseudo_bhw: pseudo-labels of as many unlabeled images.
      probability_bhwc: the teacher's probabilities, labeled images first.
      low_bhw, high_bhw: bool, pixels of low and of high entropy, labeled images first.
      bounds: see `Bounds`.
    """
    num_classes = probability_bhwc.shape[-1]

    def union(label_bhw: Array) -> Array:
        # Void is written as class 0, then cleared where the first image is void.
        known_bhw = jnp.where(label_bhw == IGNORE_LABEL, 0, label_bhw)
        hot_bhwc = jax.nn.one_hot(known_bhw, num_classes, dtype=jnp.bool_)
        void_hw = label_bhw[0] == IGNORE_LABEL
        return jnp.any(hot_bhwc, axis=0) & ~void_hw[..., None]

    hot_nc = jnp.stack([union(label_bhw), union(pseudo_bhw)]).reshape(-1, num_classes)
    p_nc, low_n, high_n = map(released_pixels, (probability_bhwc, low_bhw, high_bhw))
    unlabeled_n = jnp.arange(len(p_nc)) >= len(p_nc) // 2
    # A labeled negative would have to be of the class and also not of it.
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
    """The paper's choice among the pixels of `all_pixels`; see `released_sets`."""
    label_n = all_pixels(jnp.concatenate([label_bhw, pseudo_bhw]))
    hot_nc = jax.nn.one_hot(label_n, probability_bhwc.shape[-1], dtype=jnp.bool_)
    p_nc, low_n, high_n = map(all_pixels, (probability_bhwc, low_bhw, high_bhw))
    unlabeled_n = jnp.arange(len(p_nc)) >= len(p_nc) // 2
    # The pseudo-label of an unlabeled pixel does not matter.
    allowed_nc = ~hot_nc | unlabeled_n[:, None]
    sets = _sets(hot_nc, p_nc, low_n, high_n, unlabeled_n, allowed_nc, bounds)
    # The prototype is the mean of the possible anchors.
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
    """Chooses pixels by `bounds`; negatives only where `allowed_nc` is True."""
    reliable_nc = hot_nc & low_n[:, None]
    rank_nc = ranks(p_nc)
    middle_nc = (rank_nc >= bounds.low_rank) & (rank_nc < bounds.high_rank)
    far_nc = jnp.where(unlabeled_n[:, None], middle_nc, rank_nc < bounds.low_rank)
    unlikely_nc = p_nc < bounds.key_below
    return Sets(
        prototype=reliable_nc,
        anchor=reliable_nc & (p_nc > bounds.anchor_above),
        negative=allowed_nc & high_n[:, None] & far_nc & unlikely_nc,
    )


def nearest(map_bhw: Array, rows: int, columns: int) -> Array:
    """Resizes maps like PyTorch's "nearest": pixel i takes floor(i * height / rows)."""
    height, width = map_bhw.shape[1:]
    row = jnp.arange(rows) * height // rows
    column = jnp.arange(columns) * width // columns
    return map_bhw[:, row[:, None], column[None]]
