"""The interface of a base method: how unlabeled images supervise the student.

A method makes randomly augmented images (`augment`), has its teachers predict targets
(`prepare`, without gradient), and has its students predict the images and pairs these
predictions with their targets (`views`). It is independent of optimizer, plug-in and
device: the step calls it once per micro-batch on every device.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

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

# The default of the setting `mpmc.alpha`, alpha of eq. 7. It acts without MPMC too: the
# step weighs the loss of every view by alpha * coefficient. Methods whose paper gives
# this product as one number divide that number by the default alpha, so that with the
# default the product is the published one.
DEFAULT_ALPHA = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A base method; implementations are frozen dataclasses.

    Attributes:
      pixels: the format of stored pixels, and how they are normalized.
      scale: factor of the whole objective, including the plug-in's terms.
      delay: steps from requesting a partner image to using it; 0 for no requests.
      network_dropout: whether the network itself has dropout in train mode; kinds of
        dropout are listed in `augmentation.dropout`.
      networks: names of the students.
      streams: the crops that the data pipeline must emit.
      teacher: "student" if the students predict the targets themselves, "average" if
        their moving average (EMA) does; see `training.state.TrainState`.
      evaluated: the network that is evaluated by default: "average" for the moving
        average, if one is kept, else "student".
    """

    pixels: PixelFormat = RGB
    scale: float = 1.0
    delay: int = 0
    network_dropout: bool = False

    networks: ClassVar[tuple[str, ...]] = ("student",)
    streams: ClassVar[Streams] = Streams()
    teacher: ClassVar[Literal["student", "average"]] = "average"
    evaluated: ClassVar[Literal["student", "average"]] = "average"

    def to_unit(self, images: Array) -> Array:
        """Stored images -> floats in [0, 1], of the default float type."""
        return preprocess.to_unit(images, self.pixels, jnp.zeros(()).dtype)

    def normalize(self, images: Array) -> Array:
        """Floats in [0, 1] -> normalized network input."""
        return preprocess.normalize(images, self.pixels)

    def network_dropout_keys(
        self, draw: Callable[[str], Array], *parts: str
    ) -> Array | None:
        """The (n,) keys of the network's own dropout in one train-mode pass.

        They are for `Network.encode`, and None for a network without such dropout. They
        are drawn under names "noise/...", so that old runs draw the same; names
        "dropout/..." are for the other kinds of `augmentation.dropout`.

        Args:
          draw: `Keys.examples` or `Keys.groups`.
          parts: names of the parts of the pass's images, in order.
        """
        if not self.network_dropout:
            return None
        return jnp.concatenate([draw(f"noise/{part}") for part in parts])

    def phase(self, epoch: int) -> "Method":
        """The method used in this epoch, such as U2PL's warm-up.

        Each one is compiled once.
        """
        del epoch
        return self

    def init(self, key: Array) -> PyTree:
        """The method's own state at step 0."""
        del key
        return {}

    def independent_teacher_init(self) -> bool:
        """Whether the average's decoder starts with its own random weights.

        The encoder is copied in any case.
        """
        return False

    def memory(self, pixels: int, positions: int, groups: int) -> dict[str, int]:
        """Bytes per device for the method's state and samples.

        They are keyed by the setting that reduces them.

        Args:
          pixels: number of pixels of a crop.
          positions: number of positions of the decoder's last map of a crop.
          groups: number of groups that a device processes at once.
        """
        del pixels, positions, groups
        return {}

    def requested(self, state: PyTree, step: Array | int) -> Array:
        """The partners in `step`: indices of unlabeled images, (groups,)."""
        raise NotImplementedError(f"{type(self).__name__} requests no images")

    @abc.abstractmethod
    def augment(self, batch: Batch, state: PyTree, keys: Keys) -> PyTree:
        """Returns the method's inputs: augmented images, labels, masks for mixing.

        Every random draw of the step is made here, or gets its key here.
        """
        ...

    @abc.abstractmethod
    def regions(self, inputs: PyTree) -> dict[str, Region]:
        """The region of each loss term, by name: "supervised" and every view's."""
        ...

    @abc.abstractmethod
    def prepare(
        self, teachers: dict[str, Network], inputs: PyTree, state: PyTree
    ) -> tuple[PyTree, dict[str, PyTree], PyTree]:
        """Returns targets, updated teacher statistics and state; without gradient.

        Targets are what teachers predict before the students' passes. A method may
        take others from those passes in `views` (UniMatch, CPS).

        Args:
          teachers: keyed by the student's name; the EMA or the student, see `teacher`.
          inputs: from `augment`.
          state: the method's own state before this micro-batch.
        """
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
        """Has the students predict the augmented images, and adds their targets.

        Each `View` that is returned is a prediction with its target, not an image.
        The step differentiates this function. `students` and `teachers` are keyed by
        the student's name, and `targets` come from `prepare`.
        """
        ...

    @abc.abstractmethod
    def average_decays(
        self, step: Array, steps_per_epoch: int
    ) -> tuple[Array, Array | None] | None:
        """The decays of the averaged parameters and batch-norm statistics.

        Returns None if no average is kept; (decay, None) if the teacher updates its own
        batch-norm statistics in `prepare`.
        """
        ...


def supervised_region(label: Array, real: Array | None = None) -> Region:
    """The region of labeled pixels; pass `real` (b,h,w) bool if padding is labeled."""
    labeled = label != IGNORE_LABEL
    return Region(valid=labeled, real=labeled if real is None else labeled & real)


def in_groups(tree: T, group_size: int) -> T:
    """(b,...) arrays -> (g,group_size,...), for rules that act within a group."""
    return jax.tree.map(lambda x: x.reshape((-1, group_size) + x.shape[1:]), tree)


def concatenated(first: T, second: T) -> T:
    """Two trees of arrays -> one of their concatenations along the first axis."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)


def take(tree: T, start: int, stop: int) -> T:
    """The examples start..stop-1 of every array of a tree."""
    return jax.tree.map(lambda x: x[start:stop], tree)


def warmed_decay(step: Array, decay: float) -> Array:
    """The decay min(1 - 1/(t+1), decay): a plain average first, then exponential."""
    return jnp.minimum(1 - 1 / (step.astype(float) + 1), decay)


def warmed_decays(step: Array, decay: float) -> tuple[Array, Array]:
    """`Method.average_decays`: `warmed_decay` for parameters and statistics."""
    warmed = warmed_decay(step, decay)
    return warmed, warmed


def optional_decays(step: Array, decay: float) -> tuple[Array, Array] | None:
    """The decays of an average kept only for evaluation; None if `decay` is 0."""
    return warmed_decays(step, decay) if decay else None


def labels(batch: Batch) -> Array:
    """The labels of the labeled crops, (b,h,w) int32."""
    return batch.labeled.label.astype(jnp.int32)


def all_taps(features: Features, prediction: Prediction) -> dict[str, Array]:
    """All maps that a plug-in may read; XLA removes those that it does not read."""
    taps = dict(features.taps)
    if prediction.decoder is not None:
        taps["decoder"] = prediction.decoder
    return taps


class Pass(struct.PyTreeNode):
    """The result of one pass through a network.

    Logits are upsampled lazily, so that a slice of the batch upsamples its own logits
    alone.

    Attributes:
      module: the Flax module that upsamples them.
      size: rows and columns of the images.
      taps: tap name -> (b,h,w,d).
      coarse: (b,h,w,c) the logits at the decoder's stride.
      embedding: (b,h,w,d) at the decoder's stride, or None.
      coarse_auxiliary: (b,h,w,c) logits of the auxiliary classifier at their own
        stride, or None.
    """

    module: Any = struct.field(pytree_node=False)
    size: tuple[int, int] = struct.field(pytree_node=False)
    taps: dict[str, Array]
    coarse: Array
    embedding: Array | None = None
    coarse_auxiliary: Array | None = None

    @property
    def logits(self) -> Array:
        """(b,h,w,c) logits at full size."""
        return self.module.upsample(self.coarse, self.size)

    @property
    def auxiliary(self) -> Array | None:
        """(b,h,w,c) full-size logits of the auxiliary classifier, or None."""
        if self.coarse_auxiliary is None:
            return None
        return self.module.upsample(self.coarse_auxiliary, self.size)

    def part(self, start: int, stop: int) -> "Pass":
        """The examples start..stop-1."""
        return take(self, start, stop)

    def halves(self) -> tuple["Pass", "Pass"]:
        """Splits the batch into its two halves, such as [labeled, unlabeled] images."""
        total = len(self.coarse)
        return self.part(0, total // 2), self.part(total // 2, total)


def full_pass(
    network: Network,
    images: Array,
    decoder_dropout: Mapping[str, Array] | None = None,
    network_dropout_keys: Array | None = None,
    perturbation: Mapping[str, Array] | None = None,
    passes: int = 1,
) -> tuple[Pass, Network]:
    """Encodes and decodes images; returns the network with its updated statistics.

    Args:
      network: the network, in train or evaluation mode.
      images: (b,h,w,c) normalized.
      decoder_dropout: for `Network.decode`.
      network_dropout_keys: for `Network.encode`.
      perturbation: tap -> (b,1,1,d) multiplier of the encoder's output before it is
        decoded. The returned taps are unperturbed.
      passes: number of equal parts of the batch that are passes of their own to batch
        norm in train mode, one after the other. In one batch they take fewer kernels.
    """
    features, network = network.encode(
        images, dropout_keys=network_dropout_keys, passes=passes
    )
    return decoded(network, features, decoder_dropout, perturbation, passes)


def decoded(
    network: Network,
    features: Features,
    decoder_dropout: Mapping[str, Array] | None = None,
    perturbation: Mapping[str, Array] | None = None,
    passes: int = 1,
) -> tuple[Pass, Network]:
    """The second part of `full_pass`, from features of `Network.encode`."""
    perturbed = perturb(features, perturbation)
    prediction, network = network.decode(perturbed, decoder_dropout, passes)
    passed = Pass(
        module=network.module,
        size=features.size,
        taps=all_taps(features, prediction),
        coarse=prediction.logits,
        embedding=prediction.embedding,
        coarse_auxiliary=prediction.auxiliary,
    )
    return passed, network


def perturb(features: Features, multipliers: Mapping[str, Array] | None) -> Features:
    """Multiplies some of an encoder's outputs: tap -> (b,1,1,d) multiplier."""
    if not multipliers:
        return features
    dropped = {
        tap: features.taps[tap] * mask.astype(features.taps[tap].dtype)
        for tap, mask in multipliers.items()
    }
    return features.replace(taps={**features.taps, **dropped})


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


def sum_and_count(mask: Array) -> tuple[Array, Array]:
    """The sum and count of a mask: its mean, as a metric summed over devices."""
    return mask.sum(), jnp.asarray(mask.size)
