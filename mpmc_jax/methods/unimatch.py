"""UniMatch (CVPR 2023): two strong views and one with perturbed features.

As in the published implementation, the CutMix partner is a second crop of the same
image; on ACDC, as published there, a crop of another one (`data.partner`). Pseudo-
labels of the partner come from a pass in evaluation mode, those outside the boxes from
the train-mode pass over the weak view. Perturbed features are decoded in one batch with
clean ones. The three unlabeled terms divide by the number of pixels that are not
padding. The teacher is the student itself, not an average.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import dropout, mixing, strong_views
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.random_keys import Keys, key_of_name
from mpmc_jax.types import (
    Array,
    Batch,
    Features,
    Network,
    Outputs,
    PyTree,
    Region,
    Streams,
    View,
    ViewLoss,
)


class Inputs(struct.PyTreeNode):
    """Normalized images, not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      weak: (b,h,w,c) unlabeled images.
      real: (b,h,w) bool, real pixels of `weak`.
      strong: the strong views of `weak`.
      partner_weak, partner_real, partner_strong: the same for the partner crops.
      masks: for each strong view (b,h,w) bool, where the partner is pasted.
      perturbation: tap -> (2b,1,1,d) multiplier of the features of [image, weak];
        empty for no perturbed view.
      network_dropout_keys: for the passes over [image, weak] and over the strong
        views, see `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    weak: Array
    real: Array
    strong: tuple[Array, ...]
    partner_weak: Array
    partner_real: Array
    partner_strong: tuple[Array, ...]
    masks: tuple[Array, ...]
    perturbation: dict[str, Array]
    network_dropout_keys: tuple[Array | None, Array | None] = (None, None)


@dataclasses.dataclass(frozen=True)
class UniMatch(base.Method):
    """UniMatch: L = 1/2 (L_x + alpha (L_s1 + L_s2 + 2 L_fp)), alpha = 0.25.

    Attributes:
      perturbed_taps: (tap, channels) of the encoder outputs whose channels are dropped.
      strong_coefficients: name of each strong view -> its coefficient.
      threshold: pseudo-labels below this confidence do not count; one
        number, or one per class.
      ema_decay: if positive, an average is kept for evaluation only.
      loss: the loss of the three unlabeled terms, see `training.objective.view_loss`.
    """

    perturbed_taps: tuple[tuple[str, int], ...]
    threshold: pseudo_labels.Threshold = 0.95
    ema_decay: float = 0.0
    loss: ViewLoss = "ce"
    scale: float = dataclasses.field(default=0.5, kw_only=True)

    strong_coefficients: ClassVar[Mapping[str, float]] = {"s1": 1.0, "s2": 1.0}
    streams = Streams(partner="same")
    teacher = "student"

    def __post_init__(self) -> None:
        checks.check_optional_decay(self.ema_decay)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        weak = self.to_unit(batch.unlabeled.image)
        partner = self.to_unit(batch.partner.image)
        size = weak.shape[1:3]

        def mask(name: str) -> Array:
            drawn = mixing.draw_boxes(keys.examples(name), size[0])
            return mixing.box_mask(drawn, *size)

        strong = self._strong_images(keys, weak, partner)
        count = len(self.strong_coefficients)
        return Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            weak=self.normalize(weak),
            real=mixing.extent_mask(batch.unlabeled.extent, *size),
            strong=strong[:count],
            partner_weak=self.normalize(partner),
            partner_real=mixing.extent_mask(batch.partner.extent, *size),
            partner_strong=strong[count:],
            masks=tuple(mask(f"box{i + 1}") for i in range(count)),
            perturbation=self._perturbation(keys, weak.dtype),
            network_dropout_keys=(
                self.network_dropout_keys(keys.examples, "labeled", "unlabeled"),
                self.network_dropout_keys(keys.examples, *self._key_names()),
            ),
        )

    def _key_names(self) -> list[str]:
        """The names of the random keys of each strong view."""
        return [f"strong{i + 1}" for i in range(len(self.strong_coefficients))]

    def _strong_images(
        self, keys: Keys, weak: Array, partner: Array
    ) -> tuple[Array, ...]:
        """The strong views of both crops, in one call, so that it compiles once."""
        own = self._key_names()
        names = own + [f"partner_{name}" for name in own]
        images = strong_views.strong_view(
            jnp.concatenate([keys.examples(name) for name in names]),
            jnp.concatenate([weak] * len(own) + [partner] * len(own)),
        )
        return tuple(jnp.split(self.normalize(images), len(names)))

    def _perturbation(self, keys: Keys, dtype: jnp.dtype) -> dict[str, Array]:
        """Multipliers of the features of [labeled, weak], keyed by tap."""

        def masks(tap: str, channels: int) -> Array:
            parts = [
                dropout.feature_dropout_mask(
                    keys.examples(f"dropout/{tap}/{stream}"), channels, dtype=dtype
                )
                for stream in ("labeled", "unlabeled")
            ]
            return jnp.concatenate(parts)

        return {tap: masks(tap, channels) for tap, channels in self.perturbed_taps}

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        def mixed_region(mask: Array) -> Region:
            real = mixing.paste(mask, inputs.partner_real, inputs.real)
            return Region(valid=real, real=real)

        regions = {"supervised": base.supervised_region(inputs.label)}
        for name, mask in zip(self.strong_coefficients, inputs.masks, strict=True):
            regions[name] = mixed_region(mask)
        if inputs.perturbation:
            regions["fp"] = Region(valid=inputs.real, real=inputs.real)
        return regions

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        """Predicts confidence and label of the partner crops in evaluation mode.

        Those of the weak view come from the student's train-mode pass, in `views`.
        """
        partner, _ = base.full_pass(teachers["student"], inputs.partner_weak)
        return pseudo_labels.confidence_and_label(partner.logits), {}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: tuple[Array, Array],
        state: PyTree,
    ) -> Outputs:
        weak_features, strong_features, student = self._encode(
            students["student"], inputs
        )
        clean, perturbed, student = self._decode_weak(student, weak_features, inputs)
        strong, student = base.decoded(student, strong_features)
        labeled, weak = clean.halves()
        supervised = base.supervised_part(labeled, inputs.label)
        confidence, label = pseudo_labels.confidence_and_label(weak.logits)
        views = self._make_views(
            inputs, (confidence, label), targets, perturbed, strong, teachers["student"]
        )
        # As published, over all pixels of the weak view, including padding.
        confident = pseudo_labels.is_confident(confidence, label, self.threshold)
        metrics = {"confident_weak": base.sum_and_count(confident)}
        return Outputs((supervised,), views, {"student": student}, state, metrics)

    def _encode(
        self, student: Network, inputs: Inputs
    ) -> tuple[Features, Features, Network]:
        """Encodes [x, u], then the strong views after CutMix.

        Two strong views are as many images as [x, u]: both passes are one batch then.
        """
        mixed = [
            mixing.paste(mask, partner, image)
            for mask, partner, image in zip(
                inputs.masks, inputs.partner_strong, inputs.strong, strict=True
            )
        ]
        weak = jnp.concatenate([inputs.image, inputs.weak])
        strong = jnp.concatenate(mixed)
        keys, n = inputs.network_dropout_keys, len(weak)
        if len(strong) != n:
            of_weak, student = student.encode(weak, dropout_keys=keys[0])
            of_strong, student = student.encode(strong, dropout_keys=keys[1])
            return of_weak, of_strong, student
        images, both_keys = base.concatenated((weak, keys[0]), (strong, keys[1]))
        both, student = student.encode(images, dropout_keys=both_keys, passes=2)
        return base.take(both, 0, n), base.take(both, n, 2 * n), student

    def _decode_weak(
        self, student: Network, features: Features, inputs: Inputs
    ) -> tuple[base.Pass, base.Pass | None, Network]:
        """Decodes clean and perturbed features of [x, u] in one batch."""
        if not inputs.perturbation:
            clean, student = base.decoded(student, features)
            return clean, None, student
        clean_taps = features.taps
        all_dropped = base.perturb(features, inputs.perturbation).taps
        dropped = {tap: all_dropped[tap] for tap in inputs.perturbation}
        doubled = {
            tap: jnp.concatenate([clean_taps[tap], dropped[tap]]) for tap in dropped
        }
        keys = features.dropout_keys
        if keys is not None:
            # Networks fold small numbers into their keys: names collide with none.
            others = jax.vmap(lambda key: key_of_name(key, "perturbed"))(keys)
            keys = jnp.concatenate([keys, others])
        prediction, student = student.decode(Features(doubled, features.size, keys))
        b = inputs.image.shape[0]
        n = 2 * b

        def part(taps: Mapping[str, Array], start: int, stop: int) -> base.Pass:
            decoder = {"decoder": prediction.decoder[start:stop]}
            return base.Pass(
                module=student.module,
                size=features.size,
                taps={**taps, **decoder},
                coarse=prediction.logits[start:stop],
            )

        clean = part(clean_taps, 0, n)
        # The perturbed labeled half is decoded only so that it contributes to
        # batch-norm statistics.
        unlabeled_taps = base.take({**clean_taps, **dropped}, b, n)
        perturbed = part(unlabeled_taps, n + b, 2 * n)
        return clean, perturbed, student

    def _make_views(
        self,
        inputs: Inputs,
        weak_target: tuple[Array, Array],
        partner_target: tuple[Array, Array],
        perturbed: base.Pass | None,
        strong: base.Pass,
        teacher: Network,
    ) -> tuple[View, ...]:
        """Pairs the student's predictions with their targets, mixed like the images."""
        regions = self.regions(inputs)

        def view(name, passed, image, confidence, label, coefficient) -> View:
            confident = pseudo_labels.is_confident(confidence, label, self.threshold)
            return View(
                logits=passed.logits,
                taps=passed.taps,
                image=image,
                target=label,
                weight=confident.astype(passed.logits.dtype),
                region=regions[name],
                teacher=teacher,
                name=name,
                loss=self.loss,
                coefficient=coefficient,
            )

        views = []
        if perturbed is not None:
            views.append(view("fp", perturbed, inputs.weak, *weak_target, 2.0))
        b = len(inputs.weak)
        parts = [strong.part(i * b, (i + 1) * b) for i in range(len(inputs.masks))]
        for (name, coefficient), passed, mask in zip(
            self.strong_coefficients.items(), parts, inputs.masks, strict=True
        ):
            image = mixing.paste(mask, inputs.partner_weak, inputs.weak)
            confidence = mixing.paste(mask, partner_target[0], weak_target[0])
            label = mixing.paste(mask, partner_target[1], weak_target[1])
            views.append(view(name, passed, image, confidence, label, coefficient))
        return tuple(views)

    def average_decays(
        self, step: Array, steps_per_epoch: int
    ) -> tuple[Array, Array] | None:
        del steps_per_epoch
        return base.optional_decays(step, self.ema_decay)
