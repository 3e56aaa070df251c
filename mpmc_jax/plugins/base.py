"""What a plug-in is: extra supervision on the taps of any base method.

The step calls a plug-in in this order, once per micro-batch on every device:
`counts` (before any prediction), the method's `views`, `refine` (no gradient),
`losses` (differentiated). A plug-in knows no method: it sees `Supervised` and `View`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from mpmc_jax.losses.reduction import GlobalSum, identity
from mpmc_jax.types import Array, PyTree, Region, Supervised, View

Terms = dict[str, Array]
Metrics = dict[str, tuple[Array, Array]]


class Plugin(Protocol):
    """The interface of a plug-in; implementations are frozen dataclasses."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the taps that a method must hand over."""
        ...

    @property
    def alpha(self) -> float:
        """Weight of the base method's unlabeled terms in eq. 7."""
        ...

    @property
    def teacher_head(self) -> Literal["student", "ema"]:
        """Whose variables `refine` gets: the student's or their average."""
        ...

    @property
    def warmup_epochs(self) -> int:
        """Epochs, from the first, in which `active` is False."""
        ...

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """Variables {"params", "batch_stats"} from one example (1,h,w,d) of each tap.

        {} for a plug-in without any. They live beside the network's, so optimizer,
        average and checkpoint see them.
        """
        ...

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """This device's divisor of every term, int32, known before any prediction.

        `regions` has "supervised" and every view's name. The step adds the counts up
        over micro-batches and devices and hands the totals to `losses`. Names must
        differ from those of the regions, under which the method's pixels are counted.
        """
        ...

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[tuple[View, ...], dict[str, Any]]:
        """Reweights the views and makes targets (by view name); no gradient.

        Args:
          variables: those of the teacher's head, see `teacher_head`.
          views: the method's views, in its order.
          active: scalar bool, False during the warm-up; None for always True.
          total: sums over devices.
        """
        ...

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Supervised,
        views: Sequence[View],
        targets: Mapping[str, Any],
        counts: Mapping[str, Array],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[Terms, Metrics, PyTree]:
        """The plug-in's terms, already weighted.

        Args:
          variables: the student's.
          supervised: the labeled part of the step.
          views: the views as `refine` returned them, with the student's gradient.
          targets: what `refine` made.
          counts: totals over micro-batches and devices. Terms divide by them, so
            terms add over micro-batches.
          active: scalar bool, False during the warm-up; None for always True.
          total: sums over devices with a local gradient.

        Returns:
          Terms by name; metrics by name as this device's (sum, count); the batch
          statistics after the pass.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """No plug-in: the base method alone; alpha 1/4 is its published total (D11)."""

    taps: tuple[str, ...] = ()
    alpha: float = 0.25
    teacher_head: Literal["student", "ema"] = "student"
    warmup_epochs: int = 0

    def init(self, key: Array, taps: Mapping[str, Array]) -> dict[str, PyTree]:
        """No variables."""
        del key, taps
        return {}

    def counts(self, regions: Mapping[str, Region]) -> dict[str, Array]:
        """No terms, no divisors."""
        del regions
        return {}

    def refine(
        self,
        variables: Mapping[str, PyTree],
        views: Sequence[View],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[tuple[View, ...], dict[str, Any]]:
        """The views as they are."""
        del variables, active, total
        return tuple(views), {}

    def losses(
        self,
        variables: Mapping[str, PyTree],
        supervised: Supervised,
        views: Sequence[View],
        targets: Mapping[str, Any],
        counts: Mapping[str, Array],
        *,
        active: Array | None = None,
        total: GlobalSum = identity,
    ) -> tuple[Terms, Metrics, PyTree]:
        """No terms."""
        del variables, supervised, views, targets, counts, active, total
        return {}, {}, {}
