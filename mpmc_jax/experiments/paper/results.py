"""What the directories of an experiment's runs say about them."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections

from mpmc_jax.data.build import build_split, dataset_info
from mpmc_jax.experiments.base_config import get_base
from mpmc_jax.experiments.build import total_steps
from mpmc_jax.experiments.evaluation import best_metric
from mpmc_jax.experiments.paper.base import PlannedRun
from mpmc_jax.text import printable
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.loop import evaluations_since_best
from mpmc_jax.training.metric_writer import read_metrics

State = Literal["not run", "failed", "unfinished", "finished"]
# Settings in which a saved run may differ from the planned one: the format of files,
# and paths of the user's machine. What the lists hold is compared, see `other_run`.
_MAY_DIFFER = {"format_version", "data.labeled_ids", "data.unlabeled_ids"}
# Settings that an error line names.
_NAMED = 3
# What identifies a run's data, as its manifest names it, and as an error line does.
_DATA = {"fingerprint": "data set", "split_crc32": "labeled images"}


def planned_data(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Identifies the data set and the labeled images of a planned run.

    Returns:
      Values of `_DATA`, as manifests have them; empty if the data set is not prepared
      here.

    Raises:
      FileNotFoundError, ValueError: the labeled images cannot be listed, see
        `build_split`.
    """
    try:
        info = dataset_info(config)
    except FileNotFoundError:
        return {}
    split = build_split(config, info)
    return {"fingerprint": info.facts.fingerprint, "split_crc32": split.crc32}


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder of an experiment's runs.

    Attributes:
      folder: holds runs/, with a directory for each run, and logs/.
      configure: makes the configuration of a planned run.
      data: identifies the data of a planned run; None to take runs of any data.
      known: what `data` found, by the run's name.
    """

    folder: Path
    configure: Callable[[PlannedRun], ml_collections.ConfigDict]
    data: Callable[[ml_collections.ConfigDict], Mapping[str, Any]] | None = planned_data
    known: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

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
      reason: why it, or the final evaluation of a finished run, failed, in a line.
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


def have_same_data(one: Outcome, two: Outcome) -> bool:
    """Whether two runs have the same images, and the same of them labeled."""
    first, second = one.manifest.get("data", {}), two.manifest.get("data", {})
    return all(first.get(name) == second.get(name) for name in _DATA)


def other_run(run: PlannedRun, place: Place) -> str:
    """Says that the directory holds another run than the planned one.

    Returns:
      A line that names the settings that differ, or the data; "" if nothing does, or
      there is no run.

    Raises:
      FileNotFoundError, ValueError: see `planned_data`.
    """
    config = _read_json(place.workdir(run) / workdir_lib.CONFIG)
    if not config:
        return ""
    planned = place.configure(run)
    return _other_settings(config, planned) or _other_data(run, place, planned)


def _other_data(
    run: PlannedRun, place: Place, planned: ml_collections.ConfigDict
) -> str:
    """Says that the directory holds a run of other data than the planned one."""
    manifest = _read_json(place.workdir(run) / workdir_lib.MANIFEST)
    there = manifest.get("data", {})
    if place.data is None or not there:
        return ""
    here = place.known.get(run.name) or place.data(planned)
    place.known[run.name] = here
    differ = [
        f"{label}, {name} {there[name]} there, {here[name]} planned"
        for name, label in _DATA.items()
        if name in here and name in there and here[name] != there[name]
    ]
    if not differ:
        return ""
    return (
        f"holds a run of other data ({'; '.join(differ)}); give the --lists and the "
        "--data_dir that it was trained with, or choose another --output"
    )


def _other_settings(config: dict[str, Any], planned: ml_collections.ConfigDict) -> str:
    """Says that a saved configuration is not that of the planned run."""
    there = workdir_lib.flatten(workdir_lib.complete(config))
    here = workdir_lib.fixed_settings(planned)
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

    A run of the same name with other settings or data counts as failed, without scores,
    and so does one whose planned data cannot be read.
    """
    try:
        other = other_run(run, place)
    except (OSError, ValueError) as error:
        other = str(error)
    if other:
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
    metric = f"val/{best_metric(base)}"
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
        reason,
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
