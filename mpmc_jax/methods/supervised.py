"""Supervised training on the labeled images alone, the usual baseline."""

import dataclasses

from flax import struct

from mpmc_jax.methods import base, checks
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    Array,
    Batch,
    Network,
    Outputs,
    PyTree,
    Region,
    Streams,
)


class Inputs(struct.PyTreeNode):
    """Normalized labeled images, not augmented further.

    Attributes:
      image, label: (b,h,w,c) labeled images, (b,h,w) labels with 255 void.
      network_dropout_keys: for the pass over them, see `Method.network_dropout_keys`.
    """

    image: Array
    label: Array
    network_dropout_keys: Array | None = None


@dataclasses.dataclass(frozen=True)
class SupervisedOnly(base.Method):
    """Supervised training with the loss of `method.supervised_loss`: L = L_x.

    Attributes:
      ema_decay: if positive, an average is kept for evaluation only.
    """

    ema_decay: float = 0.0

    streams = Streams(unlabeled=False)
    teacher = "student"

    def __post_init__(self) -> None:
        checks.check_optional_decay(self.ema_decay)

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> Inputs:
        del state
        image = self.normalize(self.to_unit(batch.labeled.image))
        network_dropout_keys = self.network_dropout_keys(keys.examples, "labeled")
        return Inputs(
            image=image,
            label=base.labels(batch),
            network_dropout_keys=network_dropout_keys,
        )

    def regions(self, inputs: Inputs) -> dict[str, Region]:
        return {"supervised": base.supervised_region(inputs.label)}

    def prepare(self, teachers: dict[str, Network], inputs: Inputs, state: PyTree):
        del teachers, inputs
        return None, {}, state

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
            network_dropout_keys=inputs.network_dropout_keys,
        )
        supervised = base.supervised_part(labeled, inputs.label)
        return Outputs((supervised,), (), {"student": student}, state)

    def average_decays(
        self, step: Array, steps_per_epoch: int
    ) -> tuple[Array, Array] | None:
        del steps_per_epoch
        return base.optional_decays(step, self.ema_decay)
