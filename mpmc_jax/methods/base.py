"""What a base method is: how unlabelled images supervise the student.

A method draws (`augment`), makes targets without gradient (`prepare`) and makes the
predictions that the targets supervise (`views`). It knows no optimiser, no plug-in
and no device: the step calls it once per micro-batch on every device.
"""

import dataclasses
from typing import Literal, Protocol

import jax.numpy as jnp

from mpmc_jax.models import preprocess
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Batch,
    Features,
    Keys,
    Network,
    Outputs,
    Prediction,
    PyTree,
    Region,
    Streams,
    Supervised,
)


class Method(Protocol):
    """The interface of a base method; implementations are frozen dataclasses.

    Attributes:
      networks: names of the students.
      streams: what the data pipeline must emit.
      scale: factor on the whole objective, the plug-in's terms included.
      teacher: "student" if the students themselves make the targets, "average" if
        their moving average does.
    """

    @property
    def networks(self) -> tuple[str, ...]: ...

    @property
    def streams(self) -> Streams: ...

    @property
    def scale(self) -> float: ...

    @property
    def teacher(self) -> Literal["student", "average"]: ...

    def init(self, key: Array) -> PyTree:
        """The method's own state at step 0."""
        ...

    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> PyTree:
        """The method's inputs; every random draw of the step lies behind them."""
        ...

    def regions(self, inputs: PyTree) -> dict[str, Region]:
        """Where each loss term counts, by name: "supervised" and every view's."""
        ...

    def prepare(
        self, teachers: dict[str, Network], inputs: PyTree, state: PyTree
    ) -> tuple[PyTree, dict[str, PyTree], PyTree]:
        """Targets, teacher statistics that moved, and state; no gradient flows."""
        ...

    def views(
        self,
        students: dict[str, Network],
        teachers: dict[str, Network],
        inputs: PyTree,
        targets: PyTree,
        state: PyTree,
    ) -> Outputs:
        """The student's passes; differentiated by the step."""
        ...

    def average(self, step: Array, epoch: Array) -> tuple[Array, Array] | None:
        """Decay of the averaged parameters and statistics after this step.

        None: the method keeps no average.
        """
        ...


def real_images(crops_image: Array) -> Array:
    """uint8 images -> [0, 1] in the default float type (float64 under x64)."""
    return preprocess.to_unit(crops_image, jnp.zeros(()).dtype)


def supervised_region(label: Array) -> Region:
    """Labelled pixels; padding of labelled crops is void already."""
    labeled = label != IGNORE_LABEL
    return Region(valid=labeled, real=labeled)


def take(taps: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    """The examples start..stop of every tap."""
    return {name: tap[start:stop] for name, tap in taps.items()}


def warmed_decay(step: Array, decay: float) -> Array:
    """min(1 - 1/(t+1), decay): a plain average at first, then exponential."""
    return jnp.minimum(1 - 1 / (step.astype(float) + 1), decay)


def check_partners(method: str, group_size: int, mend: str = "") -> None:
    """Raises ValueError if a group leaves no other image to mix with."""
    if group_size < 2:
        raise ValueError(
            f"{method} mixes each image with another one of its group, but "
            f"train.group_size={group_size} leaves no other image; use a group of at "
            f"least 2{mend}"
        )


def check_average(method: str, decay: float) -> None:
    """Raises ValueError unless `decay` makes a teacher that is an average."""
    if not 0 < decay < 1:
        raise ValueError(
            f"{method}'s teacher is an average, but method.ema_decay={decay} is not "
            "between 0 and 1; published runs use 0.999"
        )


def optional_average(step: Array, decay: float) -> tuple[Array, Array] | None:
    """`Method.average` of an average that is only evaluated; None for a decay of 0."""
    if not decay:
        return None
    warmed = warmed_decay(step, decay)
    return warmed, warmed


def check_optional_decay(decay: float) -> None:
    """Raises ValueError unless `decay` is in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(
            f"method.ema_decay={decay} is not in [0, 1); 0 keeps no average"
        )


def labels(batch: Batch) -> Array:
    """The labels of the labelled crops as int32."""
    return batch.labeled.label.astype(jnp.int32)


def all_taps(features: Features, prediction: Prediction) -> dict[str, Array]:
    """Every map that a plug-in may read; what it does not read is never computed."""
    taps = dict(features.taps)
    if prediction.decoder is not None:
        taps["decoder"] = prediction.decoder
    return taps


def full_pass(network: Network, images: Array) -> tuple["Pass", Network]:
    """Encodes and decodes images; the network returns with its moved statistics."""
    features, network = network.encode(images)
    prediction, network = network.decode(features)
    logits = network.upsample(prediction.logits, features.size)
    return Pass(logits, all_taps(features, prediction)), network


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass through a network gives.

    Attributes:
      logits: (b,h,w,c) full size.
      taps: tap name -> (b,h,w,d).
    """

    logits: Array
    taps: dict[str, Array]

    def part(self, start: int, stop: int) -> "Pass":
        """The examples start..stop."""
        return Pass(self.logits[start:stop], take(self.taps, start, stop))


def supervised_part(labeled: Pass, label: Array) -> Supervised:
    """The labelled part of a step, where nothing was pasted into it."""
    return Supervised(
        logits=labeled.logits,
        taps=labeled.taps,
        label=label,
        region=supervised_region(label),
    )


def share(mask: Array) -> tuple[Array, Array]:
    """(sum, count) of a mask, a metric that adds up over devices."""
    return mask.sum(), jnp.asarray(mask.size)
