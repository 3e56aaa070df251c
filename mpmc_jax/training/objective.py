"""The objective of a training step, from the outputs of a method and a plug-in.

    L = scale * (L_x + alpha * sum_v coefficient_v L_v + plug-in terms + extra)

Every mean is a mean over the whole batch, see `losses.reduction.Reduction`.
"""

import dataclasses

import jax.numpy as jnp

from mpmc_jax import losses
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.types import VIEW_LOSSES, Array, Outputs, View


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """L_x: "ce", "ohem" with its threshold and kept pixels per group, "ce_dice".

    "ohem" ranks pixels within groups, see D14 in docs/deviations.md. "ce_dice" is the
    mean of cross-entropy and Dice, UniMatch's loss on ACDC.
    An auxiliary classifier, where the network has one, uses the same loss, weighted by
    `auxiliary_weight`.
    """

    name: str
    group_size: int
    threshold: float
    min_kept: int
    auxiliary_weight: float = 0.0

    def __post_init__(self) -> None:
        valid = ("ce", "ohem", "ce_dice")
        if self.name not in valid:
            raise ValueError(
                f"method.supervised_loss={self.name!r} is unknown; valid: {list(valid)}"
            )

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
        if self.name in ("ce", "ce_dice"):
            count = reduction.counts[term]
            mean = losses.cross_entropy(
                logits, label, count=count, global_sum=reduction.sum
            )
            if self.name == "ce":
                return mean
            dice = losses.dice_loss(logits, label, global_sum=reduction.sum)
            return (mean + dice / reduction.micro_batches) / 2
        mean = losses.ohem_cross_entropy(
            logits,
            label,
            threshold=self.threshold,
            min_kept=self.min_kept,
            group_size=self.group_size,
            global_sum=reduction.sum,
        )
        return mean / reduction.micro_batches


def view_loss(view: View, reduction: Reduction) -> Array:
    """Computes one unlabeled term with the loss that the view names.

    With w the weight of a pixel:

        ce           sum w CE / divisor: the number of valid pixels, or `normalizer`
        balanced_ce  the same, with each w times its class's `losses.class_balance`
        dice         `losses.dice_loss` weighted by w

    balanced_ce and dice need class sums of the predictions, so each micro-batch is
    balanced on its own, and Dice is averaged over micro-batches.
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
