"""U2PL (CVPR 2022): entropy decides which pixels are targets and which negatives.

As in the published implementation, pseudo-labels come from the teacher in evaluation
mode before mixing, entropies and contrast from the teacher in train mode after mixing.
The teacher is a copy of the student in the first epoch after the warm-up.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing
from mpmc_jax.augmentation.dropout import decoder_dropout_masks
from mpmc_jax.losses.contrastive import Bank, Draws
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.methods.u2pl import entropy
from mpmc_jax.methods.u2pl.contrast import Anchoring, PixelContrast
from mpmc_jax.methods.u2pl.warmup import Warmup, teacher_decay
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


class Inputs(struct.PyTreeNode):
    """Normalized images, not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void; their
        padding is labeled 0.
      labeled_real, real: (b,h,w) bool, real pixels of labeled and unlabeled images.
      weak: (b,h,w,c) unlabeled images.
      mask: (b,h,w) bool, where the next image of the group is pasted.
      decoder_dropout, teacher_decoder_dropout: map of the decoder -> (2b,1,1,d)
        multipliers.
      draws: (g,...) random numbers that choose anchors and negatives.
      group: (g,) int32, indices of the groups.
      sampling_key: (g,) random keys by which negatives for the banks are sampled.
      kept_percent, contrast_percent: () this epoch's percentiles of the entropy.
      network_dropout_keys, teacher_network_dropout_keys: for the train-mode passes, see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    labeled_real: Array
    weak: Array
    real: Array
    mask: Array
    decoder_dropout: dict[str, Array]
    teacher_decoder_dropout: dict[str, Array]
    draws: Draws
    group: Array
    sampling_key: Array
    kept_percent: Array
    contrast_percent: Array
    network_dropout_keys: Array | None = None
    teacher_network_dropout_keys: Array | None = None


class Targets(struct.PyTreeNode):
    """The targets that the teacher computes from a step's images.

    Attributes:
      label: (b,h,w) int32 pseudo-labels of the mixed images.
      weight: (b,h,w), see `entropy.kept_weights`.
      anchoring: the anchors and prototypes of the contrast.
    """

    label: Array
    weight: Array
    anchoring: Anchoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class U2PL(base.Method):
    """U2PL: L = L_x + alpha * 4 * L_u + w L_c.

    The default alpha 0.25 gives U2PL's published weight 1 of L_u.

    Attributes:
      group_size: number of images mixed, ranked and contrasted with each other.
      pixel_contrast: L_c and its settings.
      dropout_channels: (map of the decoder, channels), where a tenth of the channels
        is dropped.
      ema_decay: largest decay of the teacher.
      warmup_epochs: number of epochs with labeled images alone.
      kept_percent: pixels below this percentile of the entropy count in L_u. It rises
        to 100 over the run, linearly in epochs.
      contrast_percent: pixels up to this percentile of the entropy may be anchors, and
        pixels from 100 minus this percentile negatives. It falls to 0 over the run,
        linearly in epochs.

    Raises:
      ValueError: a group has one image, or a setting is out of range.
    """

    group_size: int
    pixel_contrast: PixelContrast
    dropout_channels: tuple[tuple[str, int], ...]
    ema_decay: float = 0.99
    warmup_epochs: int = 1
    kept_percent: float = 80.0
    contrast_percent: float = 20.0

    streams = Streams(geometry="u2pl", fill="rounded_mean", order="drawn")

    def __post_init__(self) -> None:
        checks.check_average("u2pl", self.ema_decay, 0.99)
        checks.check_partners("u2pl", self.group_size)
        limits = {"kept_percent": 100, "contrast_percent": 50}
        for name, limit in limits.items():
            if not 0 < getattr(self, name) <= limit:
                raise ValueError(
                    f"u2pl.{name}={getattr(self, name)}: must lie in (0, {limit}]"
                )
        if self.warmup_epochs < 0:
            raise ValueError(
                f"u2pl.warmup_epochs={self.warmup_epochs}: must be at least 0"
            )

    def phase(self, epoch: int) -> base.Method:
        """The supervised `Warmup` in the first epochs, then this method."""
        if epoch >= self.warmup_epochs:
            return self
        return Warmup(
            self.warmup_epochs,
            self.ema_decay,
            self.dropout_channels,
            pixels=self.pixels,
            network_dropout=self.network_dropout,
        )

    def independent_teacher_init(self) -> bool:
        """True with a warm-up, in which the teacher is not an average."""
        return self.warmup_epochs > 0

    def init(self, key: Array) -> Bank:
        """Returns empty banks."""
        del key
        return self.pixel_contrast.empty()

    def memory(self, pixels: int, positions: int, groups: int) -> dict[str, int]:
        """Bytes for the banks and the negatives sampled from them."""
        del pixels
        return self.pixel_contrast.memory(positions, groups)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        weak = self.to_unit(batch.unlabeled.image)
        size = weak.shape[1:3]
        # Published processes share these draws: one coin per step, and one box per
        # position in the group.
        coin = jax.random.bernoulli(keys.shared("coin"))
        box_keys = jax.random.split(keys.shared("box"), self.group_size)
        boxes = mixing.draw_half_boxes(box_keys, size[0])
        boxes = jnp.tile(boxes, (len(keys.group), 1))
        parts = ("labeled", "unlabeled")
        return Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            labeled_real=mixing.extent_mask(batch.labeled.extent, *size),
            weak=self.normalize(weak),
            real=mixing.extent_mask(batch.unlabeled.extent, *size),
            mask=mixing.box_mask(boxes, *size) & coin,
            decoder_dropout=decoder_dropout_masks(
                keys, "student", parts, self.dropout_channels
            ),
            teacher_decoder_dropout=decoder_dropout_masks(
                keys, "teacher", parts, self.dropout_channels
            ),
            draws=jax.vmap(self.pixel_contrast.draws)(keys.groups("contrast")),
            group=keys.group,
            # Another name of the key would change what every run draws.
            sampling_key=keys.groups("key_choice"),
            kept_percent=100 - (100 - self.kept_percent) * (1 - keys.progress),
            contrast_percent=self.contrast_percent * (1 - keys.progress),
            network_dropout_keys=self.network_dropout_keys(
                keys.examples, "labeled", "unlabeled"
            ),
            teacher_network_dropout_keys=self.network_dropout_keys(
                keys.examples, "teacher/labeled", "teacher/unlabeled"
            ),
        )

    def _mix(self, inputs: Inputs, value: Array) -> Array:
        """Pastes the group's next image inside the box."""
        return mixing.paste_next(inputs.mask, value, self.group_size)

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        """Padding counts like any other pixel."""
        real = self._mix(inputs, inputs.real)
        return {
            "supervised": base.supervised_region(inputs.label, inputs.labeled_real),
            "unlabeled": Region(valid=jnp.ones_like(real), real=real),
        }

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: Bank):
        teacher = teachers["student"]
        weak, _ = base.full_pass(teacher, inputs.weak)
        _, label = pseudo_labels.confidence_and_label(weak.logits)
        label = self._mix(inputs, label)
        images = jnp.concatenate([inputs.image, self._mix(inputs, inputs.weak)])
        both, teacher = base.full_pass(
            teacher.replace(train=True),
            images,
            inputs.teacher_decoder_dropout,
            inputs.teacher_network_dropout_keys,
        )
        _, mixed = both.halves()
        uncertain = pseudo_labels.entropy(mixed.logits)
        percent = inputs.contrast_percent
        percents = jnp.stack([percent, 100 - percent, inputs.kept_percent])
        weight, low, high = jax.vmap(_reliable, in_axes=(0, 0, None))(
            *base.in_groups((uncertain, label), self.group_size), percents
        )
        known = inputs.label != IGNORE_LABEL
        anchoring, bank = self.pixel_contrast.prepare(
            state,
            both,
            (inputs.label, label),
            (
                jnp.concatenate([known, low.reshape(label.shape)]),
                jnp.concatenate([known, high.reshape(label.shape)]),
            ),
            (inputs.group, inputs.sampling_key),
        )
        targets = Targets(label, weight.reshape(label.shape), anchoring)
        return targets, {"student": teacher.batch_stats}, bank

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: Targets,
        state: Bank,
    ) -> Outputs:
        mixed = self._mix(inputs, inputs.weak)
        images = jnp.concatenate([inputs.image, mixed])
        both, student = base.full_pass(
            students["student"],
            images,
            inputs.decoder_dropout,
            inputs.network_dropout_keys,
        )
        labeled, unlabeled = both.halves()
        view = View(
            logits=unlabeled.logits,
            taps=unlabeled.taps,
            image=mixed,
            target=targets.label,
            weight=targets.weight,
            region=self.regions(inputs)["unlabeled"],
            teacher=teachers["student"],
            # The loss is the mean over groups of weighted sums.
            normalizer=jnp.asarray(len(inputs.group)),
            name="unlabeled",
            coefficient=1 / base.DEFAULT_ALPHA,
        )
        contrast = self.pixel_contrast.term(
            both, inputs.draws, targets.anchoring, state
        )
        metrics = {"bank": (jnp.sum(state.size), jnp.asarray(len(state.keys)))}
        return Outputs(
            (base.supervised_part(labeled, inputs.label, inputs.labeled_real),),
            (view,),
            {"student": student},
            state,
            metrics,
            {"contrast": contrast},
        )

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, None]:
        """Decay 0 in the first epoch after the warm-up.

        Batch-norm statistics are not averaged: the teacher updates its own.
        """
        decay = teacher_decay(step, steps_per_epoch, self.warmup_epochs, self.ema_decay)
        return decay, None


def _reliable(
    uncertain: Array, label: Array, percents: Array
) -> tuple[Array, Array, Array]:
    """One group's loss weights, and its masks of low and of high entropy.

    `percents` are the percentiles below which entropy is low, above which it is high,
    and below which a pixel counts in the loss.
    """
    known = label != IGNORE_LABEL
    low, high, limit = entropy.entropy_percentile(uncertain, known, percents)
    weight = entropy.kept_weights(uncertain, known, limit)
    return weight, known & (uncertain <= low), known & (uncertain >= high)
