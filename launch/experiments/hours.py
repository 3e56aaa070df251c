"""How many hours runs will take: from a measured speed, or modeled from FLOPs."""

import json
import math
from typing import NamedTuple

import jax
import ml_collections

from mpmc_jax.data.build import build_split, dataset_info
from mpmc_jax.data.builders import acdc, cityscapes, voc
from mpmc_jax.data.splits import count_labeled
from mpmc_jax.experiments.build import total_steps
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.experiments.paper.results import Place
from mpmc_jax.experiments.step_program import lower_step, noise_setup
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.training.metric_writer import read_metrics

# What UniMatch's programs reach on an H100 in bfloat16 at the roofline, FLOPs per
# second: 3.7e14 to 3.9e14 in results/gpu_compile.
H100_FLOPS = 3.8e14
# Training images where the data set is not prepared here.
_PUBLISHED = {
    "acdc": acdc.EXPECTED,
    "cityscapes": cityscapes.EXPECTED,
    "voc": voc.EXPECTED,
}


class Hours(NamedTuple):
    """The hours of a run, and whether its speed was "measured" or is "modeled".

    "not modeled", with NaN: its layers are too narrow to reach `H100_FLOPS` (U-Net).
    """

    hours: float
    kind: str


class Estimator:
    """Estimates hours; remembers the FLOPs of programs, which take seconds to count.

    Args:
      place: where measured speeds are found.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._counted: dict[str, float] = {}

    def hours(self, run: PlannedRun, config: ml_collections.ConfigDict) -> Hours:
        """Estimates a whole run.

        Raises:
          ValueError, FileNotFoundError: bad settings, or the data set is not prepared
            and its size is not known.
        """
        steps, images = run_length(config)
        if speed := self._measured(run):
            return Hours(steps * images / speed / 3600, "measured")
        if config.model.name == "unet":
            return Hours(math.nan, "not modeled")
        return Hours(steps * self._flops(config) / H100_FLOPS / 3600, "modeled")

    def _measured(self, run: PlannedRun) -> float:
        """The median images per second that the run has reached; 0 if unknown."""
        name = "train/images_per_second"
        try:
            lines = read_metrics(self._place.workdir(run) / "metrics.jsonl")
        except (FileNotFoundError, ValueError):  # none yet, or damaged
            return 0.0
        speeds = sorted(line[name] for line in lines if line.get(name))
        return speeds[len(speeds) // 2] if speeds else 0.0

    def _flops(self, config: ml_collections.ConfigDict) -> float:
        """Counts the FLOPs of a step: those of two groups, times what it has of them.

        One group may be a single image per pass, which batch norm refuses.
        """
        few = config.copy_and_resolve_references()
        few.train.batch_size = min(2 * few.train.group_size, few.train.batch_size)
        settings = few.to_dict()
        program = [few.method.name, few.train.group_size, few.data.crop]
        program += [settings["model"], few.method.supervised_loss]
        program += [settings["mpmc"][key] for key in ("enabled", "tap", "windows")]
        key = json.dumps([*program, few.mpmc.head])
        if key not in self._counted:
            with compiled_for("gpu"):
                lowered = lower_step(few, jax.devices()[:1])
            self._counted[key] = lowered.cost_analysis()["flops"]
        return self._counted[key] * config.train.batch_size / few.train.batch_size


def run_length(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns the number of steps of a run and the images per step.

    Raises:
      FileNotFoundError: the data set is not prepared, and its size is not known.
    """
    name, batch = config.data.name, config.train.batch_size
    try:
        split = build_split(config, dataset_info(config))
        labeled, unlabeled = len(split.labeled), len(split.unlabeled)
    except FileNotFoundError:
        if name not in _PUBLISHED:
            raise
        images = _PUBLISHED[name]["train"]
        labeled = count_labeled(config.data.split.removeprefix("u2pl_"), images)
        unlabeled = images - labeled
    epoch = labeled if config.train.epoch_of == "labeled" else unlabeled
    steps = total_steps(config, max(epoch // batch, 1))
    streams = noise_setup(config).step.method.streams
    return steps, streams.images(batch, config.train.group_size)
