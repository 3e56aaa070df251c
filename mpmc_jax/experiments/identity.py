"""What identifies a run for its processes, directory and checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mpmc_jax import distributed
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.training import agreement, workdir
from mpmc_jax.training.manifest import make_manifest


def data_facts(
    facts: DatasetFacts, pipeline: TrainPipeline, class_weights: tuple[float, ...] = ()
) -> dict[str, Any]:
    """Describes the data of a run, which may not change when it resumes."""
    data = {
        **dataclasses.asdict(facts),
        "labeled": pipeline.num_labeled,
        "unlabeled": pipeline.num_unlabeled,
        "split_crc32": pipeline.split.crc32,
    }
    if class_weights:
        data["class_weights"] = class_weights
    return {"data": data, "steps_per_epoch": pipeline.steps_per_epoch}


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """The configuration, data and initial weights that identify a run.

    Attributes:
      config: configuration of the run.
      facts: facts of its data, see `data_facts`.
      pretrained: origin of its initial weights, see `initial_weights`; empty without
        them.
    """

    config: ml_collections.ConfigDict
    facts: dict[str, Any]
    pretrained: dict[str, Any]

    def manifest(self) -> dict[str, Any]:
        """Collects versions, devices, seed, data and initial weights."""
        return make_manifest(self.config.seed, self.facts["data"]) | self.pretrained

    def check_processes(self) -> None:
        """Compares this process's run with those of the others.

        Raises:
          SharedError: they differ; the message lists the differences.
        """
        config = workdir.flatten(self.config.to_dict())
        for name in workdir.MAY_DIFFER_BETWEEN_PROCESSES:
            del config[name]
        # Operating systems and processors may differ between hosts.
        manifest = self.manifest() | {"platform": ""}
        manifest["jax_enable_x64"] = jax.config.jax_enable_x64  # pyright: ignore
        del manifest["seed"]  # compared as part of the configuration
        agreement.check_same({"--config": config, **manifest, **self.facts})

    def check_directory(self, directory: Path) -> None:
        """Compares the run with the files of the run that is in the directory.

        Raises:
          WorkdirError: another run is there; the message lists the differences.
        """
        with agreement.failing_together():
            if distributed.is_first():
                workdir.check(directory, self.config, self.facts)

    def trained_on(self) -> dict[str, Any]:
        """Returns what the run's checkpoints store, see `workdir.trained_on`."""
        return workdir.trained_on(self.config, self.facts)

    def write(self, directory: Path, pipeline: TrainPipeline) -> None:
        """Writes config.json, manifest.json and splits/."""
        with agreement.failing_together():
            if distributed.is_first():
                workdir.write(directory, self.config, self.facts, self.manifest())
                pipeline.split.save(directory / "splits")
