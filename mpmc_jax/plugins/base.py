"""The interface of a plug-in: extra supervision on the taps of any base method.

The step calls a plug-in in this order, once per micro-batch on every device:
`counts` (before any prediction), the method's `views`, `refine` (no gradient),
`losses` (differentiated). A plug-in knows no method: it sees `Supervised` and `View`.
Evaluation and analysis call `classify_patches` and `weigh_pixels`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.types import Array, Network, PyTree, Region, Supervised, View


@dataclasses.dataclass(frozen=True)
class TapInfo:
    """The tap that a plug-in is built for, at the training crop.

    Attributes:
      name: name of the tap, such as "layer1".
      field: receptive field of its positions.
      size: rows and columns at the training crop.
      crop: side of the training crop in pixels.
      num_classes: C.
      width: `model.width`; a network's channel counts are scaled by width / 64.
      axis_name: device axis over which batch norm is synchronized.
    """

    name: str
    field: ReceptiveField
    size: tuple[int, int]
    crop: int
    num_classes: int
    width: int = 64
    axis_name: str | None = None


class PluginLosses(NamedTuple):
    """What `Plugin.losses` returns.

    Attributes:
      terms: name -> () weighted loss, added to the objective.
      metrics: name -> (sum, count) of this device.
      batch_stats: the plug-in's batch-norm statistics after the pass.
    """

    terms: dict[str, Array]
    metrics: dict[str, tuple[Array, Array]]
    batch_stats: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plug-in that does nothing; others override what they need.

    Attributes:
      teacher_head: which variables `refine` gets: "student", those being trained, or
        "ema", their moving average, which the method must keep (`Method.teacher` calls
        it "average").
      warmup_epochs: epochs, from the first, in which `active` is False.
    """

    teacher_head: Literal["student", "ema"] = "student"
    warmup_epochs: int = 0

    @property
    def classifies_patches(self) -> bool:
        """Whether `classify_patches` and `weigh_pixels` can be called."""
        return False

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the taps that a method must provide."""
        return ()

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """Makes variables {"params", "batch_stats"} from an example (1,h,w,d) per tap.

        Returns {} for a plug-in without variables. They are stored next to the
        network's, so the optimizer, the average and checkpoints include them.
        """
        del key, taps
        return {}

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """Counts this device's part of every term's divisor, int32, before predictions.

        The step sums the counts over micro-batches and devices and passes the totals to
        `losses` in its reduction.

        Args:
          regions: regions by the name of the labeled part or of the view. Counts must
            have other names: these names count the method's pixels.
        """
        del regions
        return {}

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        reduction: Reduction,
        active: Array | None,
    ) -> tuple[tuple[View, ...], dict[str, Any]]:
        """Reweights the views and makes targets (by view name); no gradient.

        Args:
          variables: the plug-in's, as `teacher_head` says.
          views: the method's views, in its order.
          reduction: sums and counts of the whole batch.
          active: () bool, False during the warm-up; None for always True.
        """
        del variables, reduction, active
        return tuple(views), {}

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Sequence[Supervised],
        views: Sequence[View],
        targets: Mapping[str, Any],
        reduction: Reduction,
    ) -> PluginLosses:
        """Computes the plug-in's terms, already weighted.

        Args:
          variables: the plug-in's, the student's.
          supervised: the labeled part of every student.
          views: the views as `refine` returned them, with the student's gradient.
          targets: what `refine` made.
          reduction: sums and counts of the whole batch.
        """
        del variables, supervised, views, targets, reduction
        return PluginLosses({}, {}, {})

    def classify_patches(
        self,
        teacher: Network,
        variables: Mapping[str, PyTree],
        images: Array,
        labels: Array,
    ) -> tuple[Array, Array, Array]:
        """Predicts the classes of labeled images' patches, computed as in `refine`.

        Args:
          teacher: the network whose tap the head reads.
          variables: variables of the head.
          images: (b,H,W,c) normalized.
          labels: (b,H,W) integer.

        Returns:
          Logits (b,h,w,C), targets (b,h,w,C) bool, valid patches (b,h,w) bool.
        """
        raise NotImplementedError(f"{type(self).__name__} classifies no patches")

    def weigh_pixels(self, logits: Array, labels: Array) -> Array:
        """Weights every pixel's label by the head's confidence in it: (b,H,W).

        Args:
          logits: (b,h,w,C) from `classify_patches`.
          labels: (b,H,W) integer, such as predictions.
        """
        raise NotImplementedError(f"{type(self).__name__} weighs no pixels")


class Identity(Plugin):
    """No plug-in: the base method alone."""
