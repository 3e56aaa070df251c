"""The total loss of a step, from what a method and a plug-in hand over.

    L = scale * (L_x + alpha * sum_v coefficient_v L_v + plug-in terms + extra)

Every mean is a global one. `Totals` adds over devices such that the value is the
same everywhere while the gradient is the local share: the step sums the gradients.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mpmc_jax import distributed, losses
from mpmc_jax.losses.pixel import confident_pixels
from mpmc_jax.types import VIEW_LOSSES, Array, Outputs, Supervised, View


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over devices and micro-batches.

    Attributes:
      axis_name: the mapped axis, or None on a single device.
      counts: term -> number of pixels (or patches) of the whole batch.
      micro_batches: number of parts of the batch, the weight of divisors that are
        only known once a part's predictions are.
    """

    axis_name: str | None
    counts: dict[str, Array]
    micro_batches: int = 1

    def sum(self, x: Array) -> Array:
        """Sum over devices; its gradient is that of this device's share."""
        if distributed.count(self.axis_name) == 1:
            return x
        total = distributed.total(x, self.axis_name)
        return x + jax.lax.stop_gradient(total - x)

    def mean(self, name: str, x: Array) -> Array:
        """This micro-batch's share of the mean over the whole batch."""
        count = jnp.maximum(self.counts[name], 1)
        return self.sum(x) / count.astype(x.dtype)

    def local_mean(self, x: Array, divisor: Array) -> Array:
        """A mean whose divisor is only known in the part, averaged over the parts."""
        divisor = self.sum(divisor.astype(x.dtype))
        safe = jnp.where(divisor > 0, divisor, jnp.ones_like(divisor))
        return self.sum(x) / safe / self.micro_batches


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """L_x: "ce", "ohem" with its threshold and kept pixels per group (D14), "ce_dice".

    "ce_dice" is the mean of cross-entropy and Dice, UniMatch's loss on ACDC.
    Where the network has an auxiliary classifier its loss is the same, and weighs
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

    def terms(self, supervised: Supervised, totals: Totals) -> dict[str, Array]:
        """The loss of each classifier, not weighted."""
        terms = {"supervised": self(supervised.logits, supervised.label, totals)}
        if supervised.auxiliary is not None:
            terms["auxiliary"] = self(supervised.auxiliary, supervised.label, totals)
        return terms

    def __call__(self, logits: Array, label: Array, totals: Totals) -> Array:
        pixel = losses.pixel_cross_entropy(logits, label)
        if self.name == "ce":
            return totals.mean("supervised", pixel.sum())
        if self.name == "ce_dice":
            dice = losses.dice_loss(logits, label, total=totals.sum)
            mean = totals.mean("supervised", pixel.sum())
            return (mean + dice / totals.micro_batches) / 2
        grouped = (label.shape[0] // self.group_size, self.group_size)
        keep = jax.vmap(
            lambda z, y: losses.ohem_keep(
                z, y, threshold=self.threshold, min_kept=self.min_kept
            )
        )(
            logits.reshape(grouped + logits.shape[1:]),
            label.reshape(grouped + label.shape[1:]),
        ).reshape(label.shape)
        return totals.local_mean(jnp.where(keep, pixel, 0).sum(), keep.sum())


def view_loss(view: View, totals: Totals) -> Array:
    """One unlabeled term, by the view's loss.

    With w the weight of a pixel:

        ce           sum w CE / divisor; the number of valid pixels, or `normalizer`
        balanced_ce  the same, each w times its class's `losses.class_balance`
        dice         `losses.dice_loss` weighted by w

    What balanced_ce and dice sum over classes is known only once a part's predictions
    are: a batch in several parts has each balanced by itself, and the mean of their
    Dice losses.
    """
    if view.loss == "dice":
        weights = jnp.where(view.region.valid, view.weight, 0)
        dice = losses.dice_loss(
            view.logits, view.target, weights=weights, total=totals.sum
        )
        return dice / totals.micro_batches
    if view.loss not in VIEW_LOSSES:
        raise ValueError(f"view {view.name!r} asks for the loss {view.loss!r}")
    pixel = losses.pixel_cross_entropy(view.logits, view.target)
    valid = view.region.valid
    if view.loss == "balanced_ce":
        pixel = pixel * losses.class_balance(
            view.target,
            valid & (view.weight > 0),
            view.logits.shape[-1],
            total=totals.sum,
        ).astype(pixel.dtype)
    summed = jnp.where(valid, view.weight.astype(pixel.dtype) * pixel, 0).sum()
    if view.normalizer is None:
        return totals.mean(view.name, summed)
    return totals.local_mean(summed, view.normalizer)


def combine(
    outputs: Outputs,
    views: tuple[View, ...],
    plugin_terms: dict[str, Array],
    totals: Totals,
    supervised_loss: SupervisedLoss,
    *,
    scale: float,
    alpha: Array | float,
) -> tuple[Array, dict[str, Array]]:
    """Total loss, and the method's terms by name.

    The plug-in's terms are only added: it reports them unweighted as metrics.

    Args:
      outputs: the method's.
      views: the method's views after the plug-in refined them.
      plugin_terms: the plug-in's losses, weighted.
      totals: sums and counts.
      supervised_loss: L_x.
      scale: the method's factor on everything.
      alpha: weight of the unlabeled terms, eq. 7.
    """
    terms = supervised_loss.terms(outputs.supervised, totals)
    loss = terms["supervised"]
    if "auxiliary" in terms:
        loss = loss + supervised_loss.auxiliary_weight * terms["auxiliary"]
    for view in views:
        terms[view.name] = view_loss(view, totals)
        loss = loss + alpha * view.coefficient * terms[view.name]
    loss = loss + sum(plugin_terms.values())
    for name, term in outputs.extra.items():
        terms[name] = totals.local_mean(term.total, term.count)
        loss = loss + term.weight * terms[name]
    return scale * loss, terms


def counted_terms(terms: dict[str, Array], totals: Totals) -> dict[str, Array]:
    """The loss terms as a log shows them: NaN where no pixel of the batch counts.

    In the objective such a term is 0, which is no mean of anything.
    """
    counts = totals.counts | {"auxiliary": totals.counts["supervised"]}
    return {
        name: jnp.where(counts.get(name.removeprefix("loss_"), 1) > 0, term, jnp.nan)
        for name, term in terms.items()
    }


def view_metrics(
    before: tuple[View, ...],
    after: tuple[View, ...],
    *,
    scale: float,
    alpha: Array | float,
) -> dict[str, tuple[Array, Array]]:
    """How many pixels teach and how much, as (sum, count) of this device.

    Only views of unlabeled images are looked at (AEL's labeled view is not).

    `confident`: the share of the pixels by which the views' losses divide that carry
    a pseudo-label of positive weight.

    `unlabeled_weight`: the factor of the mean unlabeled loss in the objective,

        scale * alpha * sum_v coefficient_v * m
        m = sum_v coefficient_v sum w' / sum_v coefficient_v sum w

    with w the method's weights of the confident pixels of view v and w' those after
    the plug-in. m is 1 without a plug-in; MPMC makes it the mean of lambda_s. A Dice
    loss divides by its weights, so that their mean cancels: there w' is w. Without a
    confident pixel nothing is counted.

    Args:
      before: the views as the method made them.
      after: the same views as the plug-in refined them.
      scale, alpha: as in `combine`.
    """
    pairs = [pair for pair in zip(before, after, strict=True) if pair[0].unlabeled]
    if not pairs:
        return {}
    confident = pixels = jnp.zeros((), jnp.int32)
    method_sum = refined_sum = jnp.zeros(())
    coefficients = 0.0
    for view, refined in pairs:
        mask = confident_pixels(view)
        confident += jnp.sum(mask, dtype=jnp.int32)
        pixels += jnp.sum(view.region.valid, dtype=jnp.int32)
        final = view if view.loss == "dice" else refined
        method_sum += view.coefficient * jnp.sum(view.weight, where=mask, dtype=float)
        refined_sum += view.coefficient * jnp.sum(final.weight, where=mask, dtype=float)
        coefficients += view.coefficient
    return {
        "confident": (confident, pixels),
        "unlabeled_weight": (scale * alpha * coefficients * refined_sum, method_sum),
    }


def classes_seen(outputs: Outputs) -> dict[str, Array]:
    """Pixels of this device by class, (c,) int32, of real images alone.

    "label": the labels that are trained on. "pseudo": the confident pseudo-labels of
    all views of unlabeled images, without those that are ground truth (AugSeg's
    injections); absent without such views.
    """
    supervised = outputs.supervised
    num_classes = supervised.logits.shape[-1]
    region = supervised.region
    counts = {
        "label": losses.class_counts(
            supervised.label, region.valid & region.real, num_classes
        )
    }
    for view in outputs.views:
        if not view.unlabeled:
            continue
        where = confident_pixels(view) & view.region.real
        if view.truth is not None:
            where &= ~view.truth
        seen = losses.class_counts(view.target, where, num_classes)
        counts["pseudo"] = counts.get("pseudo", 0) + seen
    return counts
