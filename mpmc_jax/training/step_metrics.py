"""What a training step reports besides its loss, about its pseudo-labels.

Everything here is a metric; the objective does not depend on it.
"""

import jax.numpy as jnp

from mpmc_jax import losses
from mpmc_jax.losses.pixel import confident_pixels
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.types import Array, Outputs, View


def uncounted_as_nan(terms: dict[str, Array], reduction: Reduction) -> dict[str, Array]:
    """Returns the loss terms for the log: NaN where no pixel of the batch counts.

    In the objective such a term is 0, which is the mean of nothing.
    """

    def count(name: str) -> Array | int:
        part = name.removeprefix("loss_").replace("auxiliary", "supervised")
        return reduction.counts.get(part, 1)

    return {
        name: jnp.where(count(name) > 0, term, jnp.nan) for name, term in terms.items()
    }


def view_metrics(
    before: tuple[View, ...],
    after: tuple[View, ...],
    *,
    scale: float,
    alpha: Array | float,
) -> dict[str, tuple[Array, Array]]:
    """Returns two metrics of the pseudo-labels as (sum, count) of this device.

    Only views of unlabeled images count (AEL's labeled view does not).

    "confident" is the share of the valid pixels, by which the views' losses divide,
    that have a pseudo-label of positive weight.

    "unlabeled_weight" is the factor of the mean unlabeled loss in the objective,

        scale * alpha * sum_v coefficient_v * m
        m = sum_v coefficient_v sum w' / sum_v coefficient_v sum w

    with w the method's weights of the confident pixels of view v and w' those after
    the plug-in. m is 1 without a plug-in; MPMC makes it the mean of lambda_s. A Dice
    loss divides by its weights, so that their mean cancels: there w' is w. Without a
    confident pixel its sum and count are 0.

    Args:
      before: the views as the method made them.
      after: the same views as the plug-in refined them.
      scale, alpha: as in `objective.combine`.
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
        "unlabeled_weight": (
            scale * alpha * coefficients * refined_sum,
            method_sum,
        ),
    }


def class_pixels(outputs: Outputs) -> dict[str, Array]:
    """Counts this device's pixels by class, (c,) int32; padding does not count.

    "label" counts the labels that are trained on, and "pseudo" the confident
    pseudo-labels of all views of unlabeled images, without those that are ground truth
    (AugSeg's injections). "pseudo" is absent without such views.
    """
    counts: dict[str, Array] = {}

    def add(kind: str, label: Array, where: Array, num_classes: int) -> None:
        seen = losses.class_counts(label, where, num_classes)
        counts[kind] = counts[kind] + seen if kind in counts else seen

    for part in outputs.supervised:
        where = part.region.valid & part.region.real
        add("label", part.label, where, part.logits.shape[-1])
    for view in outputs.views:
        if not view.unlabeled:
            continue
        where = confident_pixels(view) & view.region.real
        if view.truth is not None:
            where &= ~view.truth
        add("pseudo", view.target, where, view.logits.shape[-1])
    return counts
