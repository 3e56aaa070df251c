"""The parts of a training step, assembled once and read by all of training."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from mpmc_jax.methods.base import DEFAULT_ALPHA, Method
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.training import objective
from mpmc_jax.training.optimizer import Schedule
from mpmc_jax.types import Array

AXIS = "devices"

# How many further steps are started before the loop reads a step's metrics.
METRICS_LAG = 2


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The parts of a training step.

    Attributes:
      method, plugin: the base method, and the plug-in that refines its views.
      modules, teacher_modules: segmenters (Flax modules) by network name, for passes
        with and without a gradient; they differ at most in their dtype.
      optimizer: update rule.
      schedule: the optimizer's learning rate, here only to be reported; and the run's
        length, which U2PL's percentiles follow (`Keys.progress`).
      supervised_loss: L_x.
      alpha: weight of L_u in eq. 7; 1/4 gives every method its published total
        (row D11 of docs/deviations.md).
      rampup: steps over which that weight grows, see `alpha_at`.
      batch_size: labeled images per step, over all devices.
      group_size: number of images among which ranking, mixing and drawing happen.
      micro_batches: micro-batches per step, run in sequence.
      steps_per_epoch: length of an epoch.
      axis_name: the mapped axis, None on a single device without mapping.
    """

    method: Method
    plugin: Plugin
    modules: dict[str, Any]
    teacher_modules: dict[str, Any]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    supervised_loss: objective.SupervisedLoss
    batch_size: int
    group_size: int
    micro_batches: int
    steps_per_epoch: int
    axis_name: str | None = AXIS
    alpha: float = DEFAULT_ALPHA
    rampup: int = 0

    def alpha_at(self, step: Array) -> Array | float:
        """Returns the weight of L_u in eq. 7 at a step.

        It is alpha, times exp(-5 (1 - t/T)^2) in the first T = `rampup` steps
        (SSL4MIS's sigmoid ramp-up; Laine and Aila, ICLR 2017). L_u^M keeps its beta: it
        has a warm-up of its own.
        """
        if not self.rampup:
            return self.alpha
        left = 1 - jnp.minimum(step.astype(float) / self.rampup, 1)
        return self.alpha * jnp.exp(-5 * left**2)
