"""The parts of a step, put together once and read by everything in training."""

import dataclasses
from typing import Any

import optax

from mpmc_jax.methods.base import Method
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.training import objective
from mpmc_jax.training.optimizer import Schedule

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
      batch_size: labelled images a step over all devices.
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
