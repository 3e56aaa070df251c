"""FixMatch for segmentation, as UniMatch's and UniMatch V2's authors compare with it.

One strong view with CutMix learns the pseudo-labels of the weak view, and both terms
weigh one half. In UniMatch's repository the student makes its own pseudo-labels and the
CutMix partner is a second crop of the same image (`FixMatch`); in UniMatch V2's a
moving average makes them and the partner is the group in reverse order
(`AverageFixMatch`).
"""

import dataclasses

from mpmc_jax.augmentation import mixing
from mpmc_jax.methods import base, checks
from mpmc_jax.methods.mean_teacher import MeanTeacher
from mpmc_jax.methods.unimatch import UniMatch
from mpmc_jax.types import Array


@dataclasses.dataclass(frozen=True)
class FixMatch(UniMatch):
    """FixMatch without an average: L = 1/2 (L_x + L_s).

    It is UniMatch without its second strong view and its perturbed features.
    Pseudo-labels outside the box are those of the train-mode pass over
    [labeled, weak], inside it those of the partner in evaluation mode.
    """

    perturbed_taps: tuple[tuple[str, int], ...] = ()

    strong_coefficients = {"s1": 1 / base.DEFAULT_ALPHA}


@dataclasses.dataclass(frozen=True)
class AverageFixMatch(MeanTeacher):
    """FixMatch with an averaged teacher: L = 1/2 (L_x + L_s), decay at most 0.996."""

    ema_decay: float = 0.996
    scale: float = dataclasses.field(default=0.5, kw_only=True)

    coefficient = 1 / base.DEFAULT_ALPHA

    def __post_init__(self) -> None:
        checks.check_average("fixmatch", self.ema_decay, 0.996)
        checks.check_reversed("fixmatch", self.group_size)

    def partner(self, value: Array) -> Array:
        """What each image is mixed with: the group in reverse order."""
        return mixing.reverse_in_groups(value, self.group_size)
