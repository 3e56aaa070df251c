"""Mean teacher, the "basic teacher-student framework" of the paper's section 3.1.

The paper does not specify its details. In this project's baseline the teacher is an
average of the student (decay 0.999, warmed up as min(1 - 1/(t+1), decay)) and predicts
the weak view in evaluation mode; threshold (0.95, on Cityscapes 0), strong augmentation
and CutMix box are UniMatch's, with the next image of the group as partner; the student
makes one pass over [labeled, mixed]. On ACDC, where foreground is small, labeled and
unlabeled images are normalized separately (see `MeanTeacher`).
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing, strong_views
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


class Inputs(struct.PyTreeNode):
    """Normalized images, not yet mixed.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      weak, strong: (b,h,w,c) two views of the unlabeled images.
      real: (b,h,w) bool, the real pixels of the unlabeled images.
      mask: (b,h,w) bool, where the next image is pasted; None without CutMix.
      network_dropout_keys: for the pass over [labeled, mixed], see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    weak: Array
    strong: Array
    real: Array
    mask: Array | None = None
    network_dropout_keys: Array | None = None


@dataclasses.dataclass(frozen=True)
class MeanTeacher(base.Method):
    """Mean teacher: L = L_x + alpha * L_u, with alpha as in eq. 7.

    It has no published weight of L_u (row D11 of docs/deviations.md).

    Attributes:
      group_size: number of images mixed with each other.
      threshold: pseudo-labels below this confidence do not count; one
        number, or one per class.
      ema_decay: largest decay of the teacher.
      cutmix: whether the strong view is mixed.
      loss: L_u, see `training.objective.view_loss`.
      normalization: batch norm's statistics. With "joint", the student processes
        labeled images and mixed strong views in one batch, and the teacher uses the
        average of the student's running statistics. With "apart", labeled images,
        strong views and weak views are each normalized by the statistics of their own
        batch, and the teacher applies no dropout. AEL does the same, and SSL4MIS's
        teacher is in train mode as well.
    """

    group_size: int
    threshold: pseudo_labels.Threshold = 0.95
    ema_decay: float = 0.999
    cutmix: bool = True
    loss: ViewLoss = "ce"
    normalization: Literal["joint", "apart"] = "joint"

    coefficient: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        checks.check_average("mean_teacher", self.ema_decay, 0.999)
        checks.check_choice(
            "method.normalization", self.normalization, ("joint", "apart")
        )
        if self.cutmix:
            hint = ", or method.cutmix=False"
            checks.check_partners("mean_teacher", self.group_size, hint)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        weak = self.to_unit(batch.unlabeled.image)
        size = weak.shape[1:3]
        real = mixing.extent_mask(batch.unlabeled.extent, *size)
        strong = strong_views.strong_view(keys.examples("strong"), weak)
        inputs = Inputs(
            image=self.normalize(self.to_unit(batch.labeled.image)),
            label=base.labels(batch),
            weak=self.normalize(weak),
            real=real,
            strong=self.normalize(strong),
            network_dropout_keys=self.network_dropout_keys(
                keys.examples, "labeled", "unlabeled"
            ),
        )
        if not self.cutmix:
            return inputs
        boxes = mixing.draw_boxes(keys.examples("box"), size[0])
        return inputs.replace(mask=mixing.box_mask(boxes, *size))

    def partner(self, value: Array) -> Array:
        """What each image is mixed with: the next one of its group."""
        return mixing.roll_in_groups(value, self.group_size)

    def _mix(self, inputs: Inputs, value: Array) -> Array:
        """Pastes the partner inside the box."""
        if inputs.mask is None:
            return value
        return mixing.paste(inputs.mask, self.partner(value), value)

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        real = self._mix(inputs, inputs.real)
        return {
            "supervised": base.supervised_region(inputs.label),
            "unlabeled": Region(valid=real, real=real),
        }

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        teacher = teachers["student"]
        if self.normalization == "apart":
            teacher = teacher.replace(train=True)
        weak, _ = base.full_pass(teacher, inputs.weak)
        confidence, label = pseudo_labels.confidence_and_label(weak.logits)
        return {"confidence": confidence, "label": label}, {}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: PyTree,
        state: PyTree,
    ) -> Outputs:
        mixed = self._mix(inputs, inputs.strong)
        labeled, unlabeled, student = self._passes(students["student"], inputs, mixed)
        confident = pseudo_labels.is_confident(
            targets["confidence"], targets["label"], self.threshold
        )
        supervised = base.supervised_part(labeled, inputs.label)
        view = View(
            logits=unlabeled.logits,
            taps=unlabeled.taps,
            image=self._mix(inputs, inputs.weak),
            target=self._mix(inputs, targets["label"]),
            weight=self._mix(inputs, confident).astype(unlabeled.logits.dtype),
            region=self.regions(inputs)["unlabeled"],
            teacher=teachers["student"],
            name="unlabeled",
            loss=self.loss,
            coefficient=self.coefficient,
        )
        return Outputs((supervised,), (view,), {"student": student}, state)

    def _passes(
        self, student: Network, inputs: Inputs, mixed: Array
    ) -> tuple[base.Pass, base.Pass, Network]:
        """The student's passes over labeled images and over mixed strong views."""
        both, student = base.full_pass(
            student,
            jnp.concatenate([inputs.image, mixed]),
            network_dropout_keys=inputs.network_dropout_keys,
            passes=1 if self.normalization == "joint" else 2,
        )
        return *both.halves(), student

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, Array]:
        del steps_per_epoch
        return base.warmed_decays(step, self.ema_decay)
