"""The objective of a training step (eq. 7), from outputs of a method and a plug-in.

    L = scale * (L_x + alpha * sum_v coefficient_v L_v + plug-in terms + extra)

Every mean is a mean over the whole batch, see `losses.reduction.Reduction`. Only where
its divisor depends on predictions is it averaged over micro-batches.
"""

import dataclasses
import math

import jax.numpy as jnp

from mpmc_jax import losses
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.types import VIEW_LOSSES, Array, Outputs, View

# The supervised losses by name. Class weights act on those of single pixels.
PIXEL_LOSSES = ("ce", "ohem", "focal")
REGION_LOSSES = ("dice", "lovasz")


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """L_x: one of the losses by name, or the mean of two as in "ce_dice".

        ce      cross-entropy
        ohem    cross-entropy of the hard pixels, ranked within groups (row D14 of
                docs/deviations.md)
        focal   `losses.focal_loss`
        dice    `losses.dice_loss`
        lovasz  `losses.lovasz_softmax`

    "ce_dice" is UniMatch's loss on ACDC. An auxiliary classifier, where the network has
    one, uses the same loss, weighted by `auxiliary_weight`.

    Attributes:
      name: one of the above, or two of them with "_" between.
      group_size: number of images among which "ohem" ranks pixels.
      threshold, min_kept: settings of "ohem", see `losses.ohem_keep`.
      auxiliary_weight: weight of the auxiliary classifier's loss.
      class_weights: weight of each class in ce, ohem and focal; () for 1. The divisor
        stays the number of pixels.
      focal_gamma: exponent of "focal".

    Raises:
      ValueError: an unknown name, or class weights that are invalid or act on nothing.
    """

    name: str
    group_size: int
    threshold: float
    min_kept: int
    auxiliary_weight: float = 0.0
    class_weights: tuple[float, ...] = ()
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        valid, parts = (*PIXEL_LOSSES, *REGION_LOSSES), self.parts
        if not set(parts) <= set(valid) or len(parts) > 2 or len({*parts}) < len(parts):
            raise ValueError(
                f"method.supervised_loss={self.name!r} is unknown; valid: "
                f"{list(valid)}, or the mean of two, such as 'ce_dice'"
            )
        if self.class_weights and not set(parts) & set(PIXEL_LOSSES):
            raise ValueError(
                f"imbalance.class_weights do not act on method.supervised_loss="
                f"{self.name!r}, which weighs classes alike; use one of "
                f"{list(PIXEL_LOSSES)}, or leave the weights at ()"
            )
        weights = self.class_weights
        if weights and not (min(weights) >= 0 and 0 < max(weights) < math.inf):
            raise ValueError(
                f"imbalance.class_weights={weights}: weights must be finite numbers "
                "of at least 0, and one of them positive"
            )

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the losses of which L_x is the mean."""
        return tuple(self.name.split("_"))

    def __call__(
        self, logits: Array, label: Array, reduction: Reduction, term: str
    ) -> Array:
        """Computes L_x of one classifier.

        Args:
          logits: (b,h,w,c) at the image's size.
          label: (b,h,w) integer.
          reduction: sums and counts of the whole batch.
          term: `Supervised.name`, under which the labeled pixels are counted.
        """
        found = [
            self._part(name, logits, label, reduction, term) for name in self.parts
        ]
        return found[0] if len(found) == 1 else (found[0] + found[1]) / 2

    def _part(
        self, name: str, logits: Array, label: Array, reduction: Reduction, term: str
    ) -> Array:
        """Computes one loss.

        Losses that cannot use the whole batch's count are averaged over micro-batches.
        """
        total = reduction.sum
        if name in REGION_LOSSES:
            loss = losses.dice_loss if name == "dice" else losses.lovasz_softmax
            return loss(logits, label, global_sum=total) / reduction.micro_batches
        weights = None
        if self.class_weights:
            weight_c = jnp.asarray(self.class_weights, float)
            weights = losses.value_of_class(label, weight_c)
        options = {"weights": weights, "global_sum": total}
        if name == "ce":
            count = reduction.counts[term]
            return losses.cross_entropy(logits, label, count=count, **options)
        if name == "focal":
            options["count"] = reduction.counts[term]
            return losses.focal_loss(logits, label, gamma=self.focal_gamma, **options)
        mean = losses.ohem_cross_entropy(
            logits,
            label,
            threshold=self.threshold,
            min_kept=self.min_kept,
            group_size=self.group_size,
            **options,
        )
        return mean / reduction.micro_batches


def view_loss(view: View, reduction: Reduction) -> Array:
    """Computes one unlabeled term with the loss that the view names.

    With w the weight of a pixel:

        ce           sum w CE / divisor: the number of valid pixels, or `normalizer`
        balanced_ce  the same, with each w times its class's `losses.class_balance`
        dice         `losses.dice_loss` weighted by w

    Each micro-batch is balanced on its own, because balanced_ce counts the
    pseudo-labels of each class, and Dice, which sums the student's predictions, is
    averaged over micro-batches.
    """
    if view.loss == "dice":
        weights = jnp.where(view.region.valid, view.weight, 0)
        dice = losses.dice_loss(
            view.logits, view.target, weights=weights, global_sum=reduction.sum
        )
        return dice / reduction.micro_batches
    if view.loss not in VIEW_LOSSES:
        raise ValueError(f"view {view.name!r} names the unknown loss {view.loss!r}")
    pixel = losses.pixel_cross_entropy(view.logits, view.target)
    valid = view.region.valid
    if view.loss == "balanced_ce":
        pixel = pixel * losses.class_balance(
            view.target,
            valid & (view.weight > 0),
            view.logits.shape[-1],
            global_sum=reduction.sum,
        ).astype(pixel.dtype)
    summed = jnp.where(valid, view.weight.astype(pixel.dtype) * pixel, 0).sum()
    if view.normalizer is None:
        return reduction.mean(view.name, summed)
    return reduction.micro_batch_mean(summed, view.normalizer)


def combine(
    outputs: Outputs,
    views: tuple[View, ...],
    plugin_terms: dict[str, Array],
    reduction: Reduction,
    supervised_loss: SupervisedLoss,
    *,
    scale: float,
    alpha: Array | float,
) -> tuple[Array, dict[str, Array]]:
    """Returns the total loss, and the method's terms by name.

    The plug-in's terms are only added: the plug-in reports them, unweighted, as
    metrics.

    Args:
      outputs: the method's.
      views: the method's views after the plug-in refined them.
      plugin_terms: the plug-in's losses, weighted.
      reduction: sums and counts of the whole batch.
      supervised_loss: L_x.
      scale: the method's factor on everything.
      alpha: weight of L_u in eq. 7 at this step, see `StepConfig.alpha_at`.
    """
    terms: dict[str, Array] = {}
    weighted: list[Array] = []
    for part in outputs.supervised:
        terms[part.name] = supervised_loss(
            part.logits, part.label, reduction, part.name
        )
        weighted.append(terms[part.name])
        if part.auxiliary is not None:
            name = part.name.replace("supervised", "auxiliary")
            terms[name] = supervised_loss(
                part.auxiliary, part.label, reduction, part.name
            )
            weighted.append(supervised_loss.auxiliary_weight * terms[name])
    for view in views:
        terms[view.name] = view_loss(view, reduction)
        weighted.append(alpha * view.coefficient * terms[view.name])
    loss = sum(weighted[1:], start=weighted[0])
    loss = loss + sum(plugin_terms.values())
    for name, term in outputs.extra.items():
        terms[name] = reduction.micro_batch_mean(term.total, term.count)
        loss = loss + term.weight * terms[name]
    return scale * loss, terms
