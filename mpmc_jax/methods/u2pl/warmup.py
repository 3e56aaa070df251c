"""U2PL's warm-up: supervised training; the teacher only updates its statistics."""

import dataclasses

import jax.numpy as jnp
from flax import struct

from mpmc_jax.augmentation import mixing
from mpmc_jax.augmentation.dropout import decoder_dropout_masks
from mpmc_jax.methods import base
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import Array, Batch, Network, Outputs, PyTree, Region


def teacher_decay(
    step: Array, steps_per_epoch: int, warmup_epochs: int, decay: float
) -> Array:
    """The decay of U2PL's teacher: 1 in the warm-up, 0 in the epoch after it.

    It is 0 at the last step of the warm-up too, so that the next epoch starts with a
    copy. Later it is min(1 - 1/(t+1), decay), t counted from the end of the warm-up.
    """
    since = step - warmup_epochs * steps_per_epoch
    warmed = base.warmed_decay(jnp.maximum(since, 0), decay)
    copied = jnp.where(since < steps_per_epoch, 0, warmed)
    return jnp.where(since < -1, 1, copied)


class Inputs(struct.PyTreeNode):
    """Normalized labeled images.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      real: (b,h,w) bool, their real pixels.
      decoder_dropout, teacher_decoder_dropout: map of the decoder -> (b,1,1,d)
        multipliers.
      network_dropout_keys, teacher_network_dropout_keys: for the passes, see
        `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    real: Array
    decoder_dropout: dict[str, Array]
    teacher_decoder_dropout: dict[str, Array]
    network_dropout_keys: Array | None = None
    teacher_network_dropout_keys: Array | None = None


@dataclasses.dataclass(frozen=True)
class Warmup(base.Method):
    """Supervised training, L = L_x; for the attributes see `U2PL`."""

    warmup_epochs: int
    ema_decay: float
    dropout_channels: tuple[tuple[str, int], ...]

    evaluated = "student"

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        image = self.to_unit(batch.labeled.image)
        return Inputs(
            image=self.normalize(image),
            label=base.labels(batch),
            real=mixing.extent_mask(batch.labeled.extent, *image.shape[1:3]),
            decoder_dropout=decoder_dropout_masks(
                keys, "student", ("labeled",), self.dropout_channels
            ),
            teacher_decoder_dropout=decoder_dropout_masks(
                keys, "teacher", ("labeled",), self.dropout_channels
            ),
            network_dropout_keys=self.network_dropout_keys(keys.examples, "labeled"),
            teacher_network_dropout_keys=self.network_dropout_keys(
                keys.examples, "teacher/labeled"
            ),
        )

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        return {"supervised": base.supervised_region(inputs.label, inputs.real)}

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        teacher = teachers["student"].replace(train=True)
        _, teacher = base.full_pass(
            teacher,
            inputs.image,
            inputs.teacher_decoder_dropout,
            inputs.teacher_network_dropout_keys,
        )
        return None, {"student": teacher.batch_stats}, state

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: Inputs,
        targets: PyTree,
        state: PyTree,
    ) -> Outputs:
        del teachers, targets
        labeled, student = base.full_pass(
            students["student"],
            inputs.image,
            inputs.decoder_dropout,
            inputs.network_dropout_keys,
        )
        supervised = base.supervised_part(labeled, inputs.label, inputs.real)
        return Outputs((supervised,), (), {"student": student}, state)

    def average_decays(self, step: Array, steps_per_epoch: int) -> tuple[Array, None]:
        """Decay 1 during the warm-up; 0 at its last step copies the student."""
        decay = teacher_decay(step, steps_per_epoch, self.warmup_epochs, self.ema_decay)
        return decay, None
