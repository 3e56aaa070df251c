"""AEL (NeurIPS 2021): classes with low confidence are trained on more often.

Such classes are copied into labeled images, their objects are pasted into unlabeled
ones, and their pixels survive re-sampling more often. As in the published
implementation, the teacher is always in train mode, labeled and mixed images are
processed in separate batches, and every group has its own confidences.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mpmc_jax import distributed
from mpmc_jax.augmentation import mixing
from mpmc_jax.augmentation.dropout import channel_dropout
from mpmc_jax.methods import base, checks, pseudo_labels
from mpmc_jax.methods.ael import confidence as ael_confidence
from mpmc_jax.methods.ael import memory_bank
from mpmc_jax.methods.ael.components import draw_object_boxes
from mpmc_jax.methods.ael.inputs import Inputs, Targets, copy_paste, drawn_pass
from mpmc_jax.methods.ael.memory_bank import Memory
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Batch,
    Network,
    Outputs,
    Region,
    Streams,
    View,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AEL(base.Method):
    """AEL: L = scale (L_x + alpha * 4 (L_labeled + L_mixed)), alpha = 0.25 (published).

    Attributes:
      num_classes: C.
      num_unlabeled: number of images in the unlabeled list.
      group_size: labeled images per group, which has one unlabeled image and a partner.
      groups: number of groups in a batch.
      dropout_channels: (map of the decoder, channels), where a tenth of the channels
        is dropped.
      axis_name: the device axis, over which the memory is kept the same.
      threshold: pseudo-labels below this confidence are void; one
        number, or one per class.
      ema_decay: largest decay of the teacher.
      query_classes: number of draws of a class to copy into labeled images.
      unqueried: classes that are never drawn for copying.
      object_area: fraction of the crop that an object must exceed to be pasted.
      presence_area: fraction of the crop that a class must cover to count as seen.
      delay: steps from the choice of a partner to its use.
      scale: 1 / groups as released, because the released code averages gradients a
        second time.

    Raises:
      ValueError: a setting is out of range.
    """

    num_classes: int
    num_unlabeled: int
    group_size: int
    groups: int
    dropout_channels: tuple[tuple[str, int], ...]
    axis_name: str | None = None
    threshold: pseudo_labels.Threshold = 0.7
    ema_decay: float = 0.99
    query_classes: int = 1
    unqueried: tuple[int, ...] = ()
    object_area: float = 0.03
    presence_area: float = 0.03
    delay: int = dataclasses.field(default=4, kw_only=True)

    streams = Streams(
        one_per_group=True,
        partner="requested",
        source_scales=(0.1, 2.0),
        order="restarted",
        geometry="u2pl",
        fill="rounded_mean",
    )

    def __post_init__(self) -> None:
        checks.check_average("ael", self.ema_decay, 0.99)
        if self.num_unlabeled < 2:
            raise ValueError(
                f"ael mixes two unlabeled images, but there are {self.num_unlabeled};"
                " label fewer images (data.split) or add some"
            )
        if not set(self.unqueried) < set(range(self.num_classes)):
            raise ValueError(
                f"ael.unqueried={self.unqueried}: some of the classes 0 to "
                f"{self.num_classes - 1}, not all of them; use () for none"
            )
        checks.check_share("ael.object_area", self.object_area)
        checks.check_share("ael.presence_area", self.presence_area)
        checks.check_positive("ael.scale", self.scale)
        checks.check_count("ael.query_classes", self.query_classes)

    def independent_teacher_init(self) -> bool:
        """True: the teacher is random until the first step overwrites it."""
        return True

    def init(self, key: Array) -> Memory:
        """Returns a memory that has seen no image."""
        shape = (self.groups, self.num_classes, self.num_unlabeled)
        return memory_bank.begin(key, shape, self.delay)

    def memory(self, pixels: int, positions: int, groups: int) -> dict[str, int]:
        """Bytes for the record of seen classes and for re-sampling's random numbers."""
        del positions
        seen = 2 * self.groups * self.num_classes * self.num_unlabeled
        survival = 4 * groups * self.num_classes * pixels
        return {"train.batch_size": seen, "data.crop": survival}

    def requested(self, state: Memory, step: Array | int) -> Array:
        """The partners in `step`."""
        return state.image[step % self.delay]

    def augment(self, batch: Batch, state: Memory, keys: Keys) -> Inputs:
        size = batch.labeled.image.shape[1:3]
        confidence = state.confidence[keys.group]
        queried = ael_confidence.query(
            keys.groups("query"), confidence, self.query_classes, self.unqueried
        )
        queried = jnp.repeat(queried, self.group_size, axis=0)
        image, label, real = copy_paste(batch, queried)

        def uniform(name: str, *shape: int) -> Array:
            draw = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))
            return draw(keys.groups(name))

        slot = keys.step % self.delay
        return Inputs(
            image=self.normalize(self.to_unit(image)),
            label=label,
            labeled_real=real,
            first=self.normalize(self.to_unit(batch.unlabeled.image)),
            second=self.normalize(self.to_unit(batch.partner.image)),
            first_real=mixing.extent_mask(batch.unlabeled.extent, *size),
            second_real=mixing.extent_mask(batch.partner.extent, *size),
            wanted=state.label[slot, keys.group],
            seen=memory_bank.observe(batch, keys, confidence),
            slot=slot,
            object_draw=uniform("object", *size),
            box_draw=uniform("box", 3),
            survival=(
                uniform("survival", self.num_classes, *size),
                uniform("survival/mixed", *size),
            ),
            decoder_dropout=self._decoder_dropout(keys),
            network_dropout_keys={
                "labeled": self.network_dropout_keys(keys.examples, "labeled"),
                "mixed": self.network_dropout_keys(keys.groups, "mixed"),
                "teacher_labeled": self.network_dropout_keys(
                    keys.examples, "teacher/labeled"
                ),
                "teacher_unlabeled": self.network_dropout_keys(
                    keys.groups, "first", "second"
                ),
            },
        )

    def _decoder_dropout(self, keys: Keys) -> dict[str, dict[str, Array]]:
        def masks(*keys_b: Array) -> dict[str, Array]:
            return channel_dropout(jnp.concatenate(keys_b), self.dropout_channels)

        return {
            "labeled": masks(keys.examples("dropout/student")),
            "mixed": masks(keys.groups("dropout/mixed")),
            "teacher_labeled": masks(keys.examples("dropout/teacher")),
            "teacher_unlabeled": masks(
                keys.groups("dropout/first"), keys.groups("dropout/second")
            ),
        }

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        """Padding counts like any pixel; a mixed pixel is real only if real in both.

        Which of the two images it comes from is only known after `prepare`.
        """
        everywhere = jnp.ones_like(inputs.first_real)
        real = inputs.first_real & inputs.second_real
        supervised = base.supervised_region(inputs.label, inputs.labeled_real)
        return {
            "supervised": supervised,
            "labeled": Region(jnp.ones_like(supervised.valid), supervised.real),
            "unlabeled": Region(everywhere, real),
        }

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: Memory):
        teacher = teachers["student"].replace(train=True)
        labeled, teacher = drawn_pass(teacher, inputs.image, inputs, "teacher_labeled")
        both = jnp.concatenate([inputs.first, inputs.second])
        unlabeled, teacher = drawn_pass(teacher, both, inputs, "teacher_unlabeled")
        confidence, label = pseudo_labels.confidence_and_label(unlabeled.logits)
        first, second = jnp.split(label, 2)
        draws = (inputs.object_draw, inputs.box_draw)
        found, mask = draw_object_boxes(second, inputs.wanted, draws, self.object_area)

        def mix(both: Array) -> Array:
            of_first, of_second = jnp.split(both, 2)
            return mixing.paste(mask, of_second, of_first)

        of_labeled = pseudo_labels.confidence_and_label(labeled.logits)
        targets = Targets(
            mask=mask,
            found=found,
            confidence=(of_labeled[0], mix(confidence)),
            label=(
                self._void(*of_labeled),
                self._void(mix(confidence), mix(label)),
            ),
        )
        present = [
            memory_bank.present(x, self.num_classes, self.presence_area)
            for x in (first, second)
        ]
        seen = inputs.seen.replace(present=jnp.stack(present, axis=1))
        seen = distributed.gathered(seen, self.axis_name)
        state = memory_bank.remember(state, seen, inputs.slot)
        return targets, {"student": teacher.batch_stats}, state

    def _void(self, confidence: Array, label: Array) -> Array:
        confident = pseudo_labels.is_confident(confidence, label, self.threshold)
        return jnp.where(confident, label, IGNORE_LABEL)

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: Targets,
        state: Memory,
    ) -> Outputs:
        mixed = mixing.paste(targets.mask, inputs.second, inputs.first)
        student = students["student"]
        on_labeled, student = drawn_pass(student, inputs.image, inputs, "labeled")
        on_mixed, student = drawn_pass(student, mixed, inputs, "mixed")
        confidence, state = self._confidence(state, inputs, on_labeled.logits)
        regions = self.regions(inputs)

        def view(passed: base.Pass, image: Array, name: str, place: int) -> View:
            weight = ael_confidence.grouped_weights(
                passed.logits,
                targets.confidence[place],
                confidence,
                inputs.survival[place],
            )
            return View(
                logits=passed.logits,
                taps=passed.taps,
                image=image,
                target=targets.label[place],
                weight=weight,
                region=regions[name],
                teacher=teachers["student"],
                # The loss is the mean over groups of weighted means.
                normalizer=jnp.asarray(len(confidence)),
                name=name,
                coefficient=1 / base.DEFAULT_ALPHA,
                unlabeled=name == "unlabeled",
            )

        metrics = {
            "object_found": base.sum_and_count(targets.found),
            "class_confidence": (confidence.sum(), jnp.asarray(confidence.size)),
        }
        return Outputs(
            (base.supervised_part(on_labeled, inputs.label, inputs.labeled_real),),
            (
                view(on_labeled, inputs.image, "labeled", 0),
                view(on_mixed, mixed, "unlabeled", 1),
            ),
            {"student": student},
            state,
            metrics,
        )

    def _confidence(
        self, state: Memory, inputs: Inputs, logits: Array
    ) -> tuple[Array, Memory]:
        """The (g,c) confidence after this step, and the memory updated with it."""
        measured = jax.vmap(ael_confidence.class_confidence)(
            *base.in_groups((logits, inputs.label), self.group_size)
        )
        group = inputs.seen.group
        updated = ael_confidence.updated(state.confidence[group], measured)
        groups, values = distributed.gathered((group, updated), self.axis_name)
        values = values.astype(state.confidence.dtype)
        confidence = state.confidence.at[groups].set(values)
        return updated, state.replace(confidence=confidence)

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, None]:
        """Decay 0 at the first step; batch-norm statistics are the teacher's own."""
        del steps_per_epoch
        return base.warmed_decay(step, self.ema_decay), None
