"""What the directories of an experiment's runs say about them."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_collections

from mpmc_jax.experiments.base_config import get_base
from mpmc_jax.experiments.build import total_steps
from mpmc_jax.experiments.evaluation import metric_name
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.text import printable
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.loop import evaluations_since_best
from mpmc_jax.training.metric_writer import read_metrics

State = Literal["not run", "failed", "unfinished", "finished"]
# Settings in which a saved run may differ from the planned one: the format of files,
# and paths of the user's machine; the run's name has the labeled part.
_MAY_DIFFER = {"format_version", "data.labeled_ids", "data.unlabeled_ids"}
# Settings that an error line names.
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of an experiment's runs.

    Attributes:
      folder: holds runs/, with a directory for each run, and logs/.
      configure: makes the configuration of a planned run.
    """

    folder: Path
    configure: Callable[[PlannedRun], ml_collections.ConfigDict]

    def workdir(self, run: PlannedRun) -> Path:
        """The directory of a run."""
        return self.folder / "runs" / run.name

    def log(self, run: PlannedRun) -> Path:
        """What its program printed."""
        return self.folder / "logs" / f"{run.name}.log"

    def failure(self, run: PlannedRun) -> Path:
        """Exists if its last try failed, and holds the reason."""
        return self.log(run).with_suffix(".failed")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is known about a run.

    Attributes:
      state: how far it came.
      reason: why it failed, in a line.
      step, steps: the last evaluated step, and the run's length; 0 if unknown.
      metric: name of the score that picks the best checkpoint.
      evaluations: the lines of metrics.jsonl with that score, in order.
      config, manifest: of its directory; empty if there is none.
    """

    state: State
    reason: str = ""
    step: int = 0
    steps: int = 0
    metric: str = ""
    evaluations: tuple[dict[str, Any], ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)

    def last(self, name: str = "") -> float:
        """A score at the last evaluation; NaN if there is none."""
        return _number(self.evaluations[-1:], name or self.metric)

    def best(self, name: str = "") -> float:
        """A score at the evaluation where `metric` is best; NaN if there is none."""
        known = [line for line in self.evaluations if line[self.metric] is not None]
        best = max(known, key=lambda line: line[self.metric], default=None)
        return _number((best,) if best else (), name or self.metric)


def _number(lines: tuple[dict[str, Any], ...], name: str) -> float:
    value = lines[0].get(name) if lines else None
    return math.nan if value is None else float(value)


def other_settings(run: PlannedRun, place: Place) -> str:
    """Says that the directory holds another run than the planned one.

    Returns:
      A line that names the settings that differ; "" if none does, or there is no run.
    """
    config = _read_json(place.workdir(run) / workdir_lib.CONFIG)
    if not config:
        return ""
    there = workdir_lib.flatten(workdir_lib.complete(config))
    here = workdir_lib.fixed_settings(place.configure(run))
    # A run of an older version lacks some settings.
    names = (there.keys() & here.keys()) - _MAY_DIFFER
    if not (there["mpmc.enabled"] or here["mpmc.enabled"]):
        # alpha weighs L_u without MPMC too.
        unread = {x for x in names if x.startswith("mpmc.")} - {"mpmc.alpha"}
        names -= unread
    differ = [
        f"{name}={there[name]!r} there, {here[name]!r} planned"
        for name in sorted(names)
        if there[name] != here[name]
    ]
    if not differ:
        return ""
    more = [f"{len(differ) - _NAMED} more"] if len(differ) > _NAMED else []
    said = "; ".join(differ[:_NAMED] + more)
    return f"holds another run ({said}); choose another --output"


def read_outcome(run: PlannedRun, place: Place) -> Outcome:
    """Reads what is known about a run; a damaged file counts as one that is missing.

    A run of the same name with other settings counts as failed, without scores.
    """
    if other := other_settings(run, place):
        return Outcome("failed", other)
    directory = place.workdir(run)
    config = _read_json(directory / workdir_lib.CONFIG)
    manifest = _read_json(directory / workdir_lib.MANIFEST)
    failure = place.failure(run)
    reason = failure.read_text().strip() if failure.exists() else ""
    if not config or not manifest:
        return Outcome("failed" if reason else "not run", reason)
    base = get_base()
    base.update(workdir_lib.complete(config))
    steps = total_steps(base, manifest["steps_per_epoch"])
    metric = f"val/{metric_name(base)}"
    lines = ()
    try:
        metrics = read_metrics(directory / "metrics.jsonl")
        lines = tuple(line for line in metrics if metric in line)
    except FileNotFoundError:
        pass
    except ValueError as error:
        reason = str(error)
    step = int(lines[-1]["step"]) if lines else 0
    stalled = evaluations_since_best([line[metric] for line in lines])
    finished = step == steps or stalled >= base.train.patience > 0
    state: State = "finished" if finished else "failed" if reason else "unfinished"
    return Outcome(
        state,
        "" if state == "finished" else reason,
        step,
        steps,
        metric,
        lines,
        config,
        manifest,
    )


def last_line(log: Path) -> str:
    """The last line that a program printed."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return printable(said[-1]) if said else "it printed nothing"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
