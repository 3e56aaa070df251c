"""What a base method is: how unlabeled images supervise the student.

A method draws (`augment`), makes targets without gradient (`prepare`) and makes the
predictions that the targets supervise (`views`). It knows no optimizer, no plug-in
and no device: the step calls it once per micro-batch on every device.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.models import preprocess
from mpmc_jax.pixels import RGB, PixelFormat
from mpmc_jax.random_keys import Keys
from mpmc_jax.types import (
    IGNORE_LABEL,
    Array,
    Batch,
    Features,
    Network,
    Outputs,
    Prediction,
    PyTree,
    Region,
    Streams,
    Supervised,
)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """The interface of a base method; implementations are frozen dataclasses.

    Attributes:
      pixels: how images come, and how they are normalized.
      scale: factor on the whole objective, the plug-in's terms included.
      delay: steps from the request of a partner image to its use; 0 for no requests.
      element_dropout: whether the network drops single elements in train mode; see
        `dropout_keys`.
      networks: names of the students.
      streams: what the data pipeline must emit.
      teacher: "student" if the students themselves make the targets, "average" if
        their moving average does.
      evaluated: the network that is evaluated if the configuration leaves it open;
        "teacher" is the average, where there is one.
    """

    pixels: PixelFormat = RGB
    scale: float = 1.0
    delay: int = 0
    element_dropout: bool = False

    networks: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[Streams] = Streams()
    teacher: ClassVar[Literal["student", "average"]] = "average"
    evaluated: ClassVar[Literal["student", "teacher"]] = "teacher"

    def unit(self, images: Array) -> Array:
        """Images as they came -> unit values in the default float type."""
        return preprocess.to_unit(images, self.pixels, jnp.zeros(()).dtype)

    def normalize(self, images: Array) -> Array:
        """Unit values -> a network's input."""
        return preprocess.normalize(images, self.pixels)

    def dropout_keys(self, draw: Callable[[str], Array], *streams: str) -> Array | None:
        """(n,) keys of one train-mode pass for `Network.encode`.

        None for a network without element dropout, so that nothing is drawn for it.

        Args:
          draw: `Keys.examples` or `Keys.groups`.
          streams: the images of the pass, one after the other.
        """
        if not self.element_dropout:
            return None
        return jnp.concatenate([draw(f"noise/{stream}") for stream in streams])

    def phase(self, epoch: int) -> "Method":
        """The method that acts in an epoch; each one is compiled once."""
        del epoch
        return self

    def init(self, key: Array) -> PyTree:
        """The method's own state at step 0."""
        del key
        return {}

    def independent_teacher_init(self) -> bool:
        """Whether the average begins as random networks of its own, not as a copy."""
        return False

    def memory(self, pixels: int, positions: int, groups: int) -> dict[str, int]:
        """Bytes on a device of state and of what is drawn from it, by what lowers them.

        Args:
          pixels: of a crop.
          positions: of the decoder's last map of it.
          groups: that a device works on at once.
        """
        del pixels, positions, groups
        return {}

    def requested(self, state: PyTree, step: Array | int) -> Array:
        """(groups,) unlabeled images to serve as the partners of `step`."""
        raise NotImplementedError(f"{type(self).__name__} requests no images")

    @abc.abstractmethod
    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> PyTree:
        """The method's inputs; every random draw of the step lies behind them."""
        ...

    @abc.abstractmethod
    def regions(self, inputs: PyTree) -> dict[str, Region]:
        """Where each loss term counts, by name: "supervised" and every view's."""
        ...

    @abc.abstractmethod
    def prepare(
        self, teachers: dict[str, Network], inputs: PyTree, state: PyTree
    ) -> tuple[PyTree, dict[str, PyTree], PyTree]:
        """Targets, teacher statistics that moved, and state; no gradient flows."""
        ...

    @abc.abstractmethod
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

    @abc.abstractmethod
    def average(
        self, step: Array, steps_per_epoch: int
    ) -> tuple[Array, Array | None] | None:
        """Decay of the averaged parameters and statistics after this step.

        None: the method keeps no average; as second: its teacher moves statistics of
        its own, which `prepare` returns.
        """
        ...


def supervised_region(label: Array, real: Array | None = None) -> Region:
    """Labeled pixels; `real` (b,h,w) bool where a method labels padding as well."""
    labeled = label != IGNORE_LABEL
    return Region(valid=labeled, real=labeled if real is None else labeled & real)


def in_groups(tree: T, group_size: int) -> T:
    """(b,...) arrays -> (g,group_size,...), for rules that act within a group."""
    return jax.tree.map(lambda x: x.reshape((-1, group_size) + x.shape[1:]), tree)


def take(taps: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    """The examples start..stop of every tap."""
    return {name: tap[start:stop] for name, tap in taps.items()}


def warmed_decay(step: Array, decay: float) -> Array:
    """min(1 - 1/(t+1), decay): a plain average at first, then exponential."""
    return jnp.minimum(1 - 1 / (step.astype(float) + 1), decay)


def optional_average(step: Array, decay: float) -> tuple[Array, Array] | None:
    """`Method.average` of an average that is only evaluated; None for a decay of 0."""
    if not decay:
        return None
    warmed = warmed_decay(step, decay)
    return warmed, warmed


def labels(batch: Batch) -> Array:
    """The labels of the labeled crops as int32."""
    return batch.labeled.label.astype(jnp.int32)


def all_taps(features: Features, prediction: Prediction) -> dict[str, Array]:
    """Every map that a plug-in may read; what it does not read is never computed."""
    taps = dict(features.taps)
    if prediction.decoder is not None:
        taps["decoder"] = prediction.decoder
    return taps


class Pass(struct.PyTreeNode):
    """What one pass through a network gives.

    Attributes:
      logits: (b,h,w,c) full size.
      taps: tap name -> (b,h,w,d).
      coarse: (b,h,w,c) the logits at the decoder's stride.
      embedding: (b,h,w,d) at the decoder's stride, or None.
      auxiliary: (b,h,w,c) full-size logits of the auxiliary classifier, or None.
    """

    logits: Array
    taps: dict[str, Array]
    coarse: Array
    embedding: Array | None = None
    auxiliary: Array | None = None

    def part(self, start: int, stop: int) -> "Pass":
        """The examples start..stop."""
        return jax.tree.map(lambda x: x[start:stop], self)

    def halves(self) -> tuple["Pass", "Pass"]:
        """[labeled, unlabeled] images -> those of either."""
        total = len(self.logits)
        return self.part(0, total // 2), self.part(total // 2, total)


def full_pass(
    network: Network,
    images: Array,
    dropout: Mapping[str, Array] | None = None,
    dropout_keys: Array | None = None,
) -> tuple[Pass, Network]:
    """Encodes and decodes images; the network returns with its moved statistics.

    `dropout` is for `Network.decode`, `dropout_keys` for `Network.encode`.
    """
    features, network = network.encode(images, dropout_keys=dropout_keys)
    prediction, network = network.decode(features, dropout)
    auxiliary = prediction.auxiliary
    if auxiliary is not None:
        auxiliary = network.upsample(auxiliary, features.size)
    passed = Pass(
        logits=network.upsample(prediction.logits, features.size),
        taps=all_taps(features, prediction),
        coarse=prediction.logits,
        embedding=prediction.embedding,
        auxiliary=auxiliary,
    )
    return passed, network


def supervised_part(
    labeled: Pass, label: Array, real: Array | None = None
) -> Supervised:
    """The labeled part of a step; `real` as in `supervised_region`."""
    return Supervised(
        logits=labeled.logits,
        taps=labeled.taps,
        label=label,
        region=supervised_region(label, real),
        auxiliary=labeled.auxiliary,
    )


def share(mask: Array) -> tuple[Array, Array]:
    """(sum, count) of a mask, a metric that adds up over devices."""
    return mask.sum(), jnp.asarray(mask.size)
