"""The summary of an experiment: ours beside the paper's, as Markdown, CSV and a plot.

`summarize(table, place, paper)` reads whatever the runs' directories hold.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, drawing_of
from mpmc_jax.experiments.paper.base import Cell, PlannedRun, Table
from mpmc_jax.experiments.paper.final_evaluation import (
    FinalEvaluation,
    final_evaluation,
    read_scores,
)
from mpmc_jax.experiments.paper.results import (
    Outcome,
    Place,
    have_same_data,
    read_outcome,
)
from mpmc_jax.text import markdown_table, quantity
from mpmc_jax.training.workdir import flatten

# Settings that a reader needs to compare a run with the paper's.
_COMPARED = {
    "data.name": "data set",
    "data.split": "labeled part",
    "data.labeled_ids": "list of labeled images",
    "model.name": "network",
    "model.backbone": "backbone",
    "model.width": "width",
    "model.pretrained": "weights at the start",
    "model.dtype": "precision",
    "data.crop": "crop",
    "train.batch_size": "labeled images per step",
    "train.group_size": "images mixed among themselves",
    "optimizer.lr": "learning rate",
    "eval.protocol": "evaluation in training",
    "eval.pad_to": "padding of evaluated images in training",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a summary; scores in percent, NaN where unknown.

    Attributes:
      row, column: labels.
      state: "" if all seeds are finished, or what is missing.
      last, best: scores of the seeds at the last and at the best evaluation.
      scored: scores of the best checkpoints, evaluated as the published ones were.
      published: the paper's value.
      gains: `scored` minus the baseline row's, seed by seed, of equal data.
      published_gain: the paper's gain.
    """

    row: str
    column: str
    state: str
    last: tuple[float, ...]
    best: tuple[float, ...]
    scored: tuple[float, ...]
    published: float
    gains: tuple[float, ...]
    published_gain: float

    @property
    def difference(self) -> float:
        """The mean of `scored` minus the paper's."""
        return _mean(self.scored) - self.published

    def as_row(self) -> dict[str, Any]:
        """The line as a row of a CSV file; empty where a number is unknown."""
        row: dict[str, Any] = {"row": self.row, "column": self.column}
        row["seeds"] = len(self.best)
        for name in ("last", "best", "scored", "gains"):
            values = getattr(self, name)
            row[f"{name}_mean"], row[f"{name}_std"] = _mean(values), _std(values)
        row["published"], row["difference"] = self.published, self.difference
        row["published_gain"], row["state"] = self.published_gain, self.state
        return {
            key: "" if isinstance(value, float) and math.isnan(value) else value
            for key, value in row.items()
        }


@dataclasses.dataclass(frozen=True)
class Summary:
    """An experiment's table, and how its runs differ from the paper's.

    Attributes:
      table: the planned runs.
      lines: one per cell, and per class where the table has classes.
      differences: (what, here, in the paper).
      failures: name of a run -> why it failed.
    """

    table: Table
    lines: tuple[Line, ...]
    differences: tuple[tuple[str, str, str], ...]
    failures: Mapping[str, str]

    def markdown(self) -> str:
        """The summary as a Markdown page."""
        table = self.table
        seeds = sorted({run.seed for run in table.runs})
        parts = [
            f"# {table.name}: {table.experiment.title}",
            f"Data set {table.dataset}, seeds {', '.join(map(str, seeds))}. Scores in "
            "%, mean and standard deviation over seeds, of the last and of the best "
            "evaluation; scored: of the best checkpoint, evaluated as the published "
            "values were. The difference is scored minus published; a gain is over the "
            "row's baseline at the same seed."
            + (f" Published: {table.source}." if table.source else ""),
            markdown_table(
                ("", "labels", "last", "best", "scored", "published", "difference")
                + ("gain", "published gain", ""),
                [_cells(line) for line in self.lines],
            ),
        ]
        if self.failures:
            parts.append(
                "Failed:\n\n"
                + "\n".join(f"- `{run}`: {why}" for run, why in self.failures.items())
            )
        if table.experiment.note:
            parts.append(table.experiment.note)
        if self.differences:
            parts.append("How these runs differ from the paper's:")
            parts.append(markdown_table(("", "here", "paper"), self.differences))
        return "\n\n".join(parts) + "\n"

    def drawing(self) -> Drawing:
        """The plot and the numbers of the table."""
        rows = [line.as_row() for line in self.lines]
        with style.applied():
            return drawing_of(_plot(self.lines), rows)


def summarize(
    table: Table, place: Place, paper: Sequence[Mapping[str, Any]]
) -> Summary:
    """Gathers whatever there is of an experiment's runs.

    Args:
      table: the planned runs.
      place: the folder of the runs.
      paper: configurations of the paper's own runs, as nested dictionaries.
    """
    runs = {run.name: _gather(run, table, place) for run in table.runs}
    outcomes = {name: run.outcome for name, run in runs.items()}
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    lines = []
    for cell in table.cells:
        baseline = cells.get((cell.baseline, cell.column))
        names = [""]
        if table.experiment.per_class:
            names += _class_scores([outcomes[run.name] for run in cell.runs])
        for name in names:
            lines.append(_line(table, cell, baseline, runs, name))
    failures = {name: each.reason for name, each in outcomes.items() if each.reason}
    return Summary(table, tuple(lines), tuple(_differences(outcomes, paper)), failures)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What there is of a run.

    Attributes:
      outcome: what its directory says.
      evaluation: of its best checkpoint, as published; None if training's is that one.
      scores: of that evaluation; empty if there are none.
    """

    outcome: Outcome
    evaluation: FinalEvaluation | None
    scores: Mapping[str, float]

    def score(self, name: str = "") -> float:
        """A score of the best checkpoint, evaluated as published; NaN if unknown."""
        if self.evaluation is None:
            return self.outcome.best(name)
        return self.scores.get(name or self.outcome.metric, math.nan)


def _gather(run: PlannedRun, table: Table, place: Place) -> _Run:
    """Reads what there is of a run."""
    outcome = read_outcome(run, place)
    # Without published values, those of training are compared among themselves.
    evaluation = final_evaluation(place.configure(run)) if table.source else None
    if evaluation is None:
        return _Run(outcome, None, {})
    scores = read_scores(evaluation, outcome, place.workdir(run))
    return _Run(outcome, evaluation, scores)


def _class_scores(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns the names of the classes' scores that the runs have written."""
    found: dict[str, None] = {}
    for outcome in outcomes:
        for line in outcome.evaluations:
            found |= dict.fromkeys(name for name in line if name.startswith("val/iou/"))
    return list(found)


def _line(
    table: Table,
    cell: Cell,
    baseline: Cell | None,
    runs: Mapping[str, _Run],
    name: str,
) -> Line:
    """Makes the line of a cell; of one class if `name` is a class's score."""
    of = name.removeprefix("val/iou/")
    published, before = cell.published, baseline.published if baseline else math.nan
    if name:
        published, before = (
            table.published_classes.get(row, {}).get(of, math.nan)
            for row in (cell.row, cell.baseline)
        )
    own = [runs[run.name] for run in cell.runs]
    state = _state(own)
    if not _are_of_one_data_set([run.outcome for run in own]):
        own, state = [], "its seeds differ in their data"
    against = [runs[run.name] for run in baseline.runs] if baseline else []
    gains = [
        100 * (one.score(name) - other.score(name))
        for one, other in zip(own, against, strict=False)
        if have_same_data(one.outcome, other.outcome)
    ]
    others = sum(
        not have_same_data(one.outcome, other.outcome)
        for one, other in zip(own, against, strict=False)
        if one.outcome.manifest and other.outcome.manifest
    )
    if others:
        left_out = f"{quantity(others, 'gain')} left out: the baseline has other data"
        state = f"{state}, {left_out}" if state else left_out
    column = table.columns[cell.column]
    return Line(
        table.rows[cell.row],
        f"{column}, {of}" if name else column,
        state,
        _known(100 * run.outcome.last(name) for run in own),
        _known(100 * run.outcome.best(name) for run in own),
        _known(100 * run.score(name) for run in own),
        published,
        _known(gains),
        published - before,
    )


def _are_of_one_data_set(outcomes: Sequence[Outcome]) -> bool:
    """Whether all runs that have begun have the same images, and the same labeled."""
    begun = [outcome for outcome in outcomes if outcome.manifest]
    return all(have_same_data(begun[0], outcome) for outcome in begun)


def _state(runs: Sequence[_Run]) -> str:
    """Describes what is missing of the runs of one cell."""
    outcomes = [run.outcome for run in runs]
    steps = [f"step {o.step} of {o.steps}" for o in outcomes if o.state == "unfinished"]
    missing = [
        f"{quantity(count, 'run')} {state}"
        for state in ("failed", "not run")
        if (count := sum(o.state == state for o in outcomes))
    ]
    unscored = [
        run.evaluation.label
        for run in runs
        if run.outcome.state == "finished" and run.evaluation and not run.scores
    ]
    missing += [
        f"{quantity(unscored.count(label), 'run')} not scored yet ({label})"
        for label in dict.fromkeys(unscored)
    ]
    return ", ".join(steps + missing)


def _differences(
    outcomes: Mapping[str, Outcome], paper: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Lists the settings in which the runs differ from the paper's, and the device."""
    began = [outcome for outcome in outcomes.values() if outcome.config]
    if not began:
        return []
    here = [flatten(outcome.config) for outcome in began]
    there = [flatten(dict(config)) for config in paper]
    found = []
    for key, label in _COMPARED.items():
        ours, theirs = ({each[key] for each in side} for side in (here, there))
        if ours != theirs:
            found.append((label, _listed(ours), _listed(theirs)))
    lengths = {quantity(outcome.steps, "step") for outcome in began}
    epochs = {f"{each['train.epochs']} epochs" for each in there}
    found.append(("length", _listed(lengths), _listed(epochs)))
    images = {outcome.manifest["data"]["labeled"] for outcome in began}
    found.append(("labeled images", _listed(images), "-"))
    if any(outcome.manifest["data"].get("partial") for outcome in began):
        found.append(("images of the data set", "a part of them", "all"))
    devices = {str(outcome.manifest.get("device_kind", "?")) for outcome in began}
    return [*found, ("device", _listed(devices), "not stated")]


def _listed(values: set) -> str:
    return ", ".join(sorted(map(str, values - {""}))) or "none"


def _cells(line: Line) -> tuple[str, ...]:
    return (
        line.row,
        line.column,
        _shown(line.last),
        _shown(line.best),
        _shown(line.scored),
        _number(line.published),
        _number(line.difference, "+.1f"),
        _shown(line.gains, "+.1f"),
        _number(line.published_gain, "+.1f"),
        line.state,
    )


def _shown(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return "-"
    spread = f" ± {_std(values):.1f}" if len(values) > 1 else ""
    return f"{_number(_mean(values), form)}{spread}"


def _number(value: float, form: str = ".1f") -> str:
    # Adding 0 makes -0.0 positive.
    return "-" if math.isnan(value) else f"{round(value, 1) + 0.0:{form}}"


def _known(values: Any) -> tuple[float, ...]:
    return tuple(value for value in values if not math.isnan(value))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _plot(lines: Sequence[Line]) -> Canvas:
    """Draws one panel per column: our scores and the published ones by row."""
    columns = list(dict.fromkeys(line.column for line in lines))
    rows = list(dict.fromkeys(line.row for line in lines))
    height = 1.1 + 0.26 * len(rows)
    canvas, axes = style.grid(len(columns), 4.0, height, sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for line in (each for each in lines if each.column == column):
            y = rows.index(line.row)
            if line.scored:
                spread = _std(line.scored) if len(line.scored) > 1 else 0.0
                axis.errorbar(
                    _mean(line.scored), y, xerr=spread, fmt="o", color=style.BLUE
                )
            if not math.isnan(line.published):
                axis.plot(
                    *(line.published, y, "D"),
                    color=style.VERMILION,
                    markerfacecolor="none",
                )
        axis.set_title(column)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel("%")
        axis.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].plot([], [], "o", color=style.BLUE, label="ours, best checkpoint")
    if not all(math.isnan(line.published) for line in lines):
        look = {"color": style.VERMILION, "markerfacecolor": "none"}
        axes[0].plot([], [], "D", label="published", **look)
    style.legend_below(canvas, axes[0])
    return canvas
