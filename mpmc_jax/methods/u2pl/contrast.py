"""U2PL's contrastive loss: the choice of pixels, the banks and the loss term.

It has two forms. "released" is the code of the published numbers, including its
bugs: see `mpmc_jax/methods/u2pl/sets.py`, and `released_indexing` of
`contrastive.info_nce`. "corrected" follows the paper's text.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax import distributed
from mpmc_jax.losses import contrastive
from mpmc_jax.losses.contrastive import Bank, Draws, Rings
from mpmc_jax.losses.sampling import nth_true
from mpmc_jax.methods import base, checks
from mpmc_jax.methods.u2pl import sets as u2pl_sets
from mpmc_jax.types import Array, Term


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the two forms of the contrastive loss.

    Attributes:
      pixels: selects the pixels of a group's maps that take part in the contrast, in
        one list.
      sets: chooses prototypes, anchors and negatives among those pixels.
      released_indexing: whether to reproduce the released code's indexing bug; see
        `contrastive.info_nce`.
      weight: number of groups -> weight of the loss term.
      samples_negatives: whether a step's negatives are sampled, so that no group fills
        more than its part of a bank; otherwise all are added.
    """

    pixels: Callable[[Array], Array]
    sets: Callable[..., u2pl_sets.Sets]
    released_indexing: bool
    weight: Callable[[int], float]
    samples_negatives: bool


FORMS = {
    # The released code averages the loss over devices twice: its weight is 1 / devices.
    "released": Form(
        u2pl_sets.released_pixels,
        u2pl_sets.released_sets,
        released_indexing=True,
        weight=lambda groups: 1 / groups,
        samples_negatives=False,
    ),
    "corrected": Form(
        u2pl_sets.all_pixels,
        u2pl_sets.corrected_sets,
        released_indexing=False,
        weight=lambda groups: 0.1,
        samples_negatives=True,
    ),
}


class Anchoring(struct.PyTreeNode):
    """The anchors and prototypes that the teacher chooses in a step, per group.

    Attributes:
      anchor: (g,n,c) bool, pixels that may be anchors.
      prototype: (g,c,d), the prototype of each class.
      present: (g,c) bool, whether a class has a prototype.
    """

    anchor: Array
    prototype: Array
    present: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelContrast:
    """The settings of the contrastive loss, and its parts as pure functions.

    Attributes:
      num_classes: C.
      group_size: images per stream (labeled, unlabeled) in a group, within which
        pixels are contrasted.
      groups: number of groups in a batch.
      channels: channels of the embedding.
      axis_name: the device axis, over which negatives are gathered.
      contrast: a key of `FORMS`.
      contrast_weight: weight of the loss term; -1 for that of the form.
      low_rank, high_rank, anchor_above, key_below: see `Bounds` in `sets.py`.
      queries: anchors per class.
      negatives: negatives per anchor.
      temperature: divides the cosines.
      bank_size: negatives in the bank per class, except for class 0.
      bank_size_first: negatives of class 0 in the bank.
      bank_dtype: float type of the bank.

    Raises:
      ValueError: a setting is out of range.
    """

    num_classes: int
    group_size: int
    groups: int
    channels: int
    axis_name: str | None = None
    contrast: str = "released"
    contrast_weight: float = -1.0
    low_rank: int = 3
    high_rank: int = 20
    anchor_above: float = 0.3
    key_below: float = 1.0
    queries: int = 256
    negatives: int = 50
    temperature: float = 0.5
    bank_size: int = 30_000
    bank_size_first: int = 50_000
    bank_dtype: str = "float32"

    def __post_init__(self) -> None:
        checks.check_choice("u2pl.contrast", self.contrast, FORMS)
        checks.check_choice("u2pl.bank_dtype", self.bank_dtype, ("float32", "bfloat16"))
        for name in ("queries", "negatives", "bank_size", "bank_size_first"):
            checks.check_count(f"u2pl.{name}", getattr(self, name))
        if self.contrast_weight < 0 and self.contrast_weight != -1:
            raise ValueError(
                f"u2pl.contrast_weight={self.contrast_weight}: must be at least 0, or "
                "-1 for the published weight"
            )
        checks.check_share("u2pl.anchor_above", self.anchor_above)
        checks.check_share("u2pl.key_below", self.key_below)
        checks.check_positive("u2pl.temperature", self.temperature)
        if not 0 <= self.low_rank < min(self.high_rank, self.num_classes):
            raise ValueError(
                f"u2pl.low_rank={self.low_rank}, u2pl.high_rank={self.high_rank}: the "
                f"ranks of {self.num_classes} classes are 0 to {self.num_classes - 1},"
                " and a negative key's lies in [low_rank, high_rank); for few classes "
                f"use u2pl.low_rank=1 and u2pl.high_rank={self.num_classes}"
            )

    @property
    def form(self) -> Form:
        """The form that `contrast` names."""
        return FORMS[self.contrast]

    @property
    def rings(self) -> Rings:
        """The layout of the banks of all classes."""
        rest = (self.bank_size,) * (self.num_classes - 1)
        return Rings((self.bank_size_first, *rest))

    def empty(self) -> Bank:
        """Returns empty banks."""
        return self.rings.empty(self.channels, self.bank_dtype)

    def memory(self, positions: int, groups: int) -> dict[str, int]:
        """Bytes per device, keyed by the setting that reduces them."""
        itemsize = jnp.dtype(self.bank_dtype).itemsize
        # The old bank is kept until the update is accepted, so there are two.
        bank = 2 * sum(self.rings.capacities) * self.channels * itemsize
        # A step's negatives of all groups; sampled ones fill at most one bank.
        candidates = self.groups * positions
        if self.form.samples_negatives:
            candidates = min(candidates, max(self.rings.capacities))
        # The gathered negatives of one class, in the forward and the backward pass.
        negatives = 2 * groups * self.queries * self.negatives
        return {
            "u2pl.bank_size (or u2pl.bank_dtype=bfloat16)": bank,
            "train.batch_size or data.crop": candidates * self.channels * 4,
            "u2pl.queries or u2pl.negatives": negatives * self.channels * 4,
        }

    def draws(self, key: Array) -> Draws:
        """Draws the random numbers that choose one group's anchors and negatives."""
        shape = (self.num_classes, self.queries, 1 + self.negatives)
        uniform = jax.random.uniform(key, shape, jnp.float32)
        return Draws(anchor=uniform[..., 0], negative=uniform[..., 1:])

    def prepare(
        self,
        bank: Bank,
        teacher: base.Pass,
        labels: tuple[Array, Array],
        reliability: tuple[Array, Array],
        groups: tuple[Array, Array],
    ) -> tuple[Anchoring, Bank]:
        """Chooses pixels by the teacher's pass and adds the negatives to the banks.

        Args:
          bank: the banks before the step.
          teacher: the pass over [labeled, unlabeled] images, (2b,...).
          labels: full-size labels and pseudo-labels, (b,h,w) each.
          reliability: full-size masks (2b,h,w) of low and of high entropy.
          groups: (g,) indices of this device's groups, and (g,) random keys, by which
            negatives are sampled if there are too many.
        """
        height, width = teacher.coarse.shape[1:3]
        bounds = u2pl_sets.Bounds(
            self.anchor_above, self.key_below, self.low_rank, self.high_rank
        )
        masks = [
            self._both(u2pl_sets.nearest(mask, height, width)) for mask in reliability
        ]
        small = [u2pl_sets.nearest(label, height, width) for label in labels]
        sets = jax.vmap(lambda *each: self.form.sets(*each, bounds))(
            *base.in_groups(small, self.group_size),
            self._both(jax.nn.softmax(teacher.coarse)),
            *masks,
        )
        pixels = self._pixels(teacher)
        anchoring = Anchoring(
            anchor=sets.anchor,
            prototype=jax.vmap(contrastive.prototypes)(pixels, sets.prototype),
            present=jax.vmap(lambda one: one.present)(sets),
        )
        return anchoring, self._fill(bank, pixels, sets.negative, groups)

    def term(
        self, student: base.Pass, draws: Draws, targets: Anchoring, bank: Bank
    ) -> Term:
        """The loss term: the mean over groups, from a pass over all 2b images."""

        def one(features, anchor, prototype, present, draws) -> Array:
            return contrastive.info_nce(
                features,
                anchor,
                prototype,
                present,
                self.rings,
                bank,
                draws,
                temperature=self.temperature,
                released_indexing=self.form.released_indexing,
            )

        each = jax.vmap(one)(
            self._pixels(student),
            targets.anchor,
            targets.prototype,
            targets.present,
            draws,
        )
        weight = self.contrast_weight
        if weight == -1:
            weight = self.form.weight(self.groups)
        return Term(jnp.sum(each), jnp.asarray(len(each)), weight)

    def _both(self, x: Array) -> Array:
        """(2b,...) -> (g,2n,...): labeled and unlabeled images of each group."""
        split = x.reshape((2, -1, self.group_size) + x.shape[1:])
        grouped = jnp.moveaxis(split, 0, 1)
        return grouped.reshape((len(grouped), 2 * self.group_size) + x.shape[1:])

    def _pixels(self, passed: base.Pass) -> Array:
        """The embeddings of the pixels that take part in the contrast, (g,n,d)."""
        if passed.embedding is None:
            raise ValueError("U2PL needs a network that is built with embedding=True")
        return jax.vmap(self.form.pixels)(self._both(passed.embedding))

    def _fill(
        self, bank: Bank, pixels: Array, negatives: Array, groups: tuple[Array, Array]
    ) -> Bank:
        """Adds the new negatives of all devices to the banks, group after group.

        Args:
          bank: the banks before the step.
          pixels: (g,n,d) embeddings.
          negatives: (g,n,c) bool, the pixels that are negatives of each class.
          groups: (g,) indices of the groups, and (g,) random keys.
        """
        index, sampling_key = groups
        # With several processes, the devices do not hold the groups in order.
        order = jnp.argsort(distributed.gathered(index, self.axis_name))

        def joined(part: Array) -> Array:
            """(g,n,...) -> (all groups * n,...)."""
            everywhere = distributed.gathered(part, self.axis_name)[order]
            return everywhere.reshape((-1,) + part.shape[2:])

        if not self.form.samples_negatives:
            # Labeled pixels, the first half, are never negatives.
            half = pixels.shape[1] // 2
            return self.rings.push(
                bank, joined(pixels[:, half:]), joined(negatives[:, half:])
            )
        limits = [max(size // self.groups, 1) for size in self.rings.capacities]
        place = jnp.arange(min(max(limits), pixels.shape[1]))
        # The first pixels of a class in a random order are a uniform sample.
        shuffled = jax.vmap(lambda key: jax.random.permutation(key, pixels.shape[1]))(
            sampling_key
        )
        negatives = jnp.take_along_axis(negatives, shuffled[..., None], axis=1)

        def choose(label: Array) -> tuple[Array, Array]:
            of_class = negatives[:, :, label]
            found = jax.vmap(nth_true, in_axes=(0, None))(of_class, place)
            source = jnp.take_along_axis(shuffled, found, axis=1, mode="clip")
            drawn = jnp.take_along_axis(pixels, source[..., None], axis=1)
            limit = jnp.minimum(of_class.sum(1), jnp.asarray(limits)[label])
            return joined(drawn), joined(place[None] < limit[:, None])

        return self.rings.push_each(bank, choose)
