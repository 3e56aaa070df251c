"""AugSeg (CVPR 2023): random intensity operations and adaptive CutMix.

As in the published implementation, labeled images are injected into unlabeled ones that
the teacher is unsure of, in two stages; the unlabeled loss divides by all pixels,
including padding, which is trained on; the teacher is a copy of the student in the
first epoch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing, strong_views
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Batch,
    Network,
    Outputs,
    PyTree,
    Region,
    Streams,
    View,
)

# Beta parameters of lambda, the fraction of the area outside the box.
_LABELED_BETA = (8.0, 2.0)
_UNLABELED_BETA = (4.0, 4.0)


class Inputs(struct.PyTreeNode):
    """Normalized images, not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      weak, strong: (b,h,w,c) two views of the unlabeled images.
      real: (b,h,w) bool, the real pixels of the unlabeled images.
      orders: (g,n) the partner of each example within its group.
      labeled_mask: (b,h,w) bool, where the partner's labeled image may be injected.
      mask: (b,h,w) bool, where the partner's unlabeled image goes.
      coin: (b,) in 0..1; an image is injected into if 1 - its confidence exceeds it.
      network_dropout_keys: for the pass over [labeled, mixed], see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    weak: Array
    strong: Array
    real: Array
    orders: Array
    labeled_mask: Array
    mask: Array
    coin: Array
    network_dropout_keys: Array | None = None


class Targets(struct.PyTreeNode):
    """The teacher's predictions on the weak views, mixed.

    Attributes:
      injected: (b,h,w) bool, pixels of an unlabeled image that are replaced by a
        labeled one, before unlabeled images are mixed.
      label: (b,h,w) int32, 255 where an injected label is void.
      confidence: (b,h,w), 1 where the label is ground truth.
      truth: (b,h,w) bool, pixels whose label is ground truth.
    """

    injected: Array
    label: Array
    confidence: Array
    truth: Array


@dataclasses.dataclass(frozen=True)
class AugSeg(base.Method):
    """AugSeg: L = L_x + alpha * 4 * L_u.

    The default alpha 0.25 weighs both equally (row D11 of docs/deviations.md).

    Attributes:
      group_size: number of images mixed with each other; per GPU in published runs.
      threshold: pseudo-labels below this confidence do not count; one
        number, or one per class.
      ema_decay: largest decay of the teacher.
    """

    group_size: int
    threshold: pseudo_labels.Threshold = 0.95
    ema_decay: float = 0.999

    streams = Streams(geometry="augseg", fill="mean", order="drawn")

    def __post_init__(self) -> None:
        checks.check_average("augseg", self.ema_decay, 0.999)
        checks.check_partners("augseg", self.group_size)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        weak = self.to_unit(batch.unlabeled.image)
        size = weak.shape[1:3]

        def mask(name: str, beta: tuple[float, float]) -> Array:
            drawn = mixing.draw_squares(
                keys.groups(name), keys.examples(name), size[0], beta=beta
            )
            return mixing.box_mask(drawn, *size)

        coin = jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32))
        strong = strong_views.intensity_view(keys.examples("strong"), weak)
        return Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            weak=self.normalize(weak),
            strong=self.normalize(strong),
            real=mixing.extent_mask(batch.unlabeled.extent, *size),
            orders=mixing.draw_orders(keys.groups("order"), self.group_size),
            labeled_mask=mask("labeled_box", _LABELED_BETA),
            mask=mask("box", _UNLABELED_BETA),
            coin=coin(keys.examples("coin")),
            network_dropout_keys=self.network_dropout_keys(
                keys.examples, "labeled", "unlabeled"
            ),
        )

    def _mix(
        self, inputs: Inputs, injected: Array, labeled: Array, unlabeled: Array
    ) -> Array:
        """Injects the labeled partners, then pastes each partner's injected image."""
        partner = mixing.permute_in_groups(labeled, inputs.orders)
        copy = mixing.paste(injected, partner, unlabeled)
        partner = mixing.permute_in_groups(copy, inputs.orders)
        return mixing.paste(inputs.mask, partner, unlabeled)

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        """The loss divides by all pixels.

        Injected pixels are real where the pixel they replace is: whether an image is
        injected into is only known after `prepare`.
        """
        partner = mixing.permute_in_groups(inputs.real, inputs.orders)
        real = mixing.paste(inputs.mask, partner, inputs.real)
        return {
            "supervised": base.supervised_region(inputs.label),
            "unlabeled": Region(valid=jnp.ones_like(real), real=real),
        }

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        weak, _ = base.full_pass(teachers["student"], inputs.weak)
        confidence, label = pseudo_labels.confidence_and_label(weak.logits)
        unsure = 1 - pseudo_labels.image_confidence(weak.logits)
        injected = inputs.labeled_mask & (inputs.coin < unsure)[:, None, None]

        def mix(labeled: Array, unlabeled: Array) -> Array:
            return self._mix(inputs, injected, labeled, unlabeled)

        targets = Targets(
            injected=injected,
            label=mix(inputs.label, label),
            confidence=mix(jnp.ones_like(confidence), confidence),
            truth=mix(jnp.ones_like(injected), jnp.zeros_like(injected)),
        )
        return targets, {}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: Targets,
        state: PyTree,
    ) -> Outputs:
        mixed = self._mix(inputs, targets.injected, inputs.image, inputs.strong)
        images = jnp.concatenate([inputs.image, mixed])
        both, student = base.full_pass(
            students["student"],
            images,
            network_dropout_keys=inputs.network_dropout_keys,
        )
        labeled, unlabeled = both.halves()
        confident = pseudo_labels.is_confident(
            targets.confidence, targets.label, self.threshold
        )
        supervised = base.supervised_part(labeled, inputs.label)
        counts = confident & (targets.label != IGNORE_LABEL)
        view = View(
            logits=unlabeled.logits,
            taps=unlabeled.taps,
            image=self._mix(inputs, targets.injected, inputs.image, inputs.weak),
            target=targets.label,
            weight=counts.astype(unlabeled.logits.dtype),
            region=self.regions(inputs)["unlabeled"],
            teacher=teachers["student"],
            truth=targets.truth,
            name="unlabeled",
            coefficient=1 / base.DEFAULT_ALPHA,
        )
        metrics = {
            "injected": base.sum_and_count(targets.truth),
        }
        return Outputs((supervised,), (view,), {"student": student}, state, metrics)

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, Array]:
        """Decay 0 in the first epoch, when the teacher is a copy of the student."""
        warmed = base.warmed_decay(step, self.ema_decay)
        decay = jnp.where(step >= steps_per_epoch, warmed, 0)
        return decay, decay
