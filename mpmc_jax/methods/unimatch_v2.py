"""UniMatch V2 (TPAMI 2025): two strong views with complementary feature dropout.

As in the published implementation, a moving average labels the weak view, the CutMix
partner is the group in reverse order, and a channel that one strong view loses is
doubled in the other; half of a group's images keep all channels. Each term divides by
the number of pixels that are not padding.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import dropout, mixing, strong_views
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    Array,
    Batch,
    Network,
    Outputs,
    PyTree,
    Region,
    View,
    ViewLoss,
)

_VIEWS = ("s1", "s2")


class Inputs(struct.PyTreeNode):
    """Normalized images, not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      weak: (b,h,w,c) unlabeled images.
      real: (b,h,w) bool, real pixels of `weak`.
      strong: two strong views of `weak`.
      masks: for each of them (b,h,w) bool, where the partner is pasted.
      perturbation: tap -> (2b,1,1,d) multiplier of the features of [s1, s2].
      network_dropout_keys: for the passes over the labeled images and over [s1, s2],
        see `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    weak: Array
    real: Array
    strong: tuple[Array, Array]
    masks: tuple[Array, Array]
    perturbation: dict[str, Array]
    network_dropout_keys: tuple[Array | None, Array | None] = (None, None)


@dataclasses.dataclass(frozen=True)
class UniMatchV2(base.Method):
    """UniMatch V2: L = 1/2 (L_x + (L_s1 + L_s2) / 2).

    A plug-in reads a strong view's taps before they are dropped.

    Attributes:
      group_size: number of images mixed with each other; even.
      perturbed_taps: (tap, channels) of the encoder outputs whose channels are dropped.
        Those of one width share a mask.
      threshold: pseudo-labels below this confidence do not count; one
        number, or one per class.
      ema_decay: largest decay of the teacher.
      loss: L_s1 and L_s2, see `training.objective.view_loss`.
    """

    group_size: int
    perturbed_taps: tuple[tuple[str, int], ...]
    threshold: pseudo_labels.Threshold = 0.95
    ema_decay: float = 0.996
    loss: ViewLoss = "ce"
    scale: float = dataclasses.field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        checks.check_average("unimatch_v2", self.ema_decay, 0.996)
        checks.check_reversed("unimatch_v2", self.group_size)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        weak = self.to_unit(batch.unlabeled.image)
        size = weak.shape[1:3]
        images = strong_views.strong_view(
            jnp.concatenate([keys.examples(f"strong{i}") for i in (1, 2)]),
            jnp.concatenate([weak, weak]),
        )
        first, second = jnp.split(self.normalize(images), 2)
        boxes = [mixing.draw_boxes(keys.examples(f"box{i}"), size[0]) for i in (1, 2)]
        return Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            weak=self.normalize(weak),
            real=mixing.extent_mask(batch.unlabeled.extent, *size),
            strong=(first, second),
            masks=(mixing.box_mask(boxes[0], *size), mixing.box_mask(boxes[1], *size)),
            perturbation=self._perturbation(keys, weak.dtype),
            network_dropout_keys=(
                self.network_dropout_keys(keys.examples, "labeled"),
                self.network_dropout_keys(keys.examples, "strong1", "strong2"),
            ),
        )

    def _perturbation(self, keys: Keys, dtype: jnp.dtype) -> dict[str, Array]:
        kept = dropout.draw_kept(keys.groups("dropout/kept"), self.group_size)
        by_width = {
            channels: jnp.concatenate(
                dropout.complementary_masks(
                    keys.groups(f"dropout/{channels}"), channels, kept, dtype=dtype
                )
            )
            for channels in sorted({width for _, width in self.perturbed_taps})
        }
        return {tap: by_width[channels] for tap, channels in self.perturbed_taps}

    def _mix(self, mask: Array, value: Array) -> Array:
        """Pastes the reversed group inside the box."""
        return mixing.paste(
            mask, mixing.reverse_in_groups(value, self.group_size), value
        )

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        regions = {"supervised": base.supervised_region(inputs.label)}
        for name, mask in zip(_VIEWS, inputs.masks, strict=True):
            real = self._mix(mask, inputs.real)
            regions[name] = Region(valid=real, real=real)
        return regions

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        """Predicts confidence and label of the weak view in evaluation mode."""
        weak, _ = base.full_pass(teachers["student"], inputs.weak)
        return pseudo_labels.confidence_and_label(weak.logits), {}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: tuple[Array, Array],
        state: PyTree,
    ) -> Outputs:
        labeled, student = base.full_pass(
            students["student"],
            inputs.image,
            network_dropout_keys=inputs.network_dropout_keys[0],
        )
        mixed = [
            self._mix(mask, image)
            for mask, image in zip(inputs.masks, inputs.strong, strict=True)
        ]
        both, student = base.full_pass(
            student,
            jnp.concatenate(mixed),
            network_dropout_keys=inputs.network_dropout_keys[1],
            perturbation=inputs.perturbation,
        )
        regions, (confidence, label) = self.regions(inputs), targets
        confident = pseudo_labels.is_confident(confidence, label, self.threshold)
        views = [
            View(
                logits=passed.logits,
                taps=passed.taps,
                image=self._mix(mask, inputs.weak),
                target=self._mix(mask, label),
                weight=self._mix(mask, confident).astype(passed.logits.dtype),
                region=regions[name],
                teacher=teachers["student"],
                name=name,
                loss=self.loss,
                coefficient=0.5 / base.DEFAULT_ALPHA,
            )
            for name, passed, mask in zip(
                _VIEWS, both.halves(), inputs.masks, strict=True
            )
        ]
        supervised = base.supervised_part(labeled, inputs.label)
        metrics = {"confident_weak": base.sum_and_count(confident)}
        return Outputs(
            (supervised,), tuple(views), {"student": student}, state, metrics
        )

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, Array]:
        del steps_per_epoch
        return base.warmed_decays(step, self.ema_decay)
