"""The parts of a step, put together once and read by everything in training."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from mpmc_jax.methods.base import Method
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.training import objective
from mpmc_jax.training.optimizer import Schedule
from mpmc_jax.types import Array

AXIS = "devices"

# Steps that may be under way before the loop reads a step's numbers.
LAG = 2


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The parts of a step.

    Attributes:
      method, plugin: the base method and what refines it.
      modules, teachers: segmenter by network name, for passes with and without a
        gradient; they differ in their dtype at most.
      optimizer, schedule: update rule, and the rate it follows (for the metrics).
      supervised_loss: L_x.
      alpha: weight of L_u in eq. 7; 1/4 gives every method its published total (D11).
      rampup: steps over which that weight grows, see `unlabeled_weight`.
      batch_size: labeled images a step over all devices.
      group_size: images that rank, mix and draw among themselves.
      micro_batches: parts worked off one after the other.
      steps_per_epoch: length of an epoch.
      axis_name: the mapped axis, None on a single device without mapping.
    """

    method: Method
    plugin: Plugin
    modules: dict[str, Any]
    teachers: dict[str, Any]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    supervised_loss: objective.SupervisedLoss
    batch_size: int
    group_size: int
    micro_batches: int
    steps_per_epoch: int
    axis_name: str | None = AXIS
    alpha: float = 0.25
    rampup: int = 0

    def unlabeled_weight(self, step: Array) -> Array | float:
        """The weight of L_u in eq. 7 at a step.

        alpha, times exp(-5 (1 - t/T)^2) in the first T = `rampup` steps (SSL4MIS's
        sigmoid ramp-up; Laine and Aila, ICLR 2017). L_u^M keeps its beta: it has a
        warm-up of its own.
        """
        if not self.rampup:
            return self.alpha
        left = 1 - jnp.minimum(step.astype(float) / self.rampup, 1)
        return self.alpha * jnp.exp(-5 * left**2)
