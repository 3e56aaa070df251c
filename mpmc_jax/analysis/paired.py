"""The summary of our own experiments: differences of pairs of runs of equal seeds.

`summarize(table, place)` reads whatever the runs' directories hold. A verdict says
whether a mean exceeds twice its standard error; p-values are those of paired t-tests.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import special, stats

from mpmc_jax.analysis import style
from mpmc_jax.analysis.base import Drawing, drawing_of
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.experiments.base_config import get_base
from mpmc_jax.experiments.build import build_base
from mpmc_jax.experiments.paper.base import Cell, Pair, Table, text
from mpmc_jax.experiments.paper.results import (
    Outcome,
    Place,
    have_same_data,
    read_outcome,
)
from mpmc_jax.text import markdown_table, quantity
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.metric_writer import read_metrics

# Standard errors that a verdict asks for.
_ERRORS = 2
_BETTER = f"better by more than {_ERRORS} standard errors"
_WORSE = f"worse by more than {_ERRORS} standard errors"
_WITHIN = f"within {_ERRORS} standard errors"
_FEW = "too few seeds"
VERDICTS = (_BETTER, _WORSE, _WITHIN, _FEW)
# With two seeds, 30% of means without true difference exceed them.
_LEAST_SEEDS = 3
# The p-value below which a t-test finds a difference, and how often it must.
_LEVEL, _POWER = 0.05, 0.8
# Numbers of seeds for which the page says what they let a t-test find.
_SEEDS = (3, 5, 10)


def by_chance(seeds: int) -> float:
    """Computes how often a mean without true difference exceeds the verdict's errors.

    It is better in half of these cases, and worse in the others.
    """
    return 2 * float(stats.t.sf(_ERRORS, seeds - 1))


CHANCE = (
    f"Without any true difference, a mean exceeds {_ERRORS} standard errors, in either "
    "direction, in "
    + ", ".join(
        f"{by_chance(seeds):.0%} of cases with {seeds} seeds" for seeds in _SEEDS
    )
    + ". p is that of a paired t-test, for each pair alone: of many pairs, some are "
    "small by chance. Seeds change the order of images and the initial weights; the "
    "labeled images are the same, so that nothing is said of others."
)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The scores of a row minus those of another, seed by seed, in percent.

    Attributes:
      pair: the rows.
      label, against: their names in the table.
      last, best: differences of the last and of the best evaluations.
      left_out: finished pairs of runs that lack a finite score, or that differ in
        their data.
    """

    pair: Pair
    label: str
    against: str
    last: tuple[float, ...]
    best: tuple[float, ...]
    left_out: int = 0

    def verdict(self) -> str:
        """Says which of `VERDICTS` the last scores have."""
        if len(self.last) < _LEAST_SEEDS:
            return _FEW
        mean, error = statistics.fmean(self.last), standard_error(self.last)
        if abs(mean) <= _ERRORS * error:
            return _WITHIN
        return _BETTER if mean > 0 else _WORSE

    def p_value(self) -> float:
        """Computes the p-value of a paired t-test of the last scores, two-sided.

        NaN for fewer than two seeds, or if all differences are equal.
        """
        if len(set(self.last)) < 2:
            return math.nan
        ratio = abs(statistics.fmean(self.last)) / standard_error(self.last)
        return 2 * float(stats.t.sf(ratio, len(self.last) - 1))

    def as_row(self) -> dict[str, Any]:
        """The difference as a row of a CSV file; empty where a number is unknown."""
        row: dict[str, Any] = {
            "row": self.pair.row,
            "against": self.pair.against,
            "seeds": len(self.last),
            "left_out": self.left_out,
        }
        for name in ("last", "best"):
            values = getattr(self, name)
            row[f"{name}_mean"] = statistics.fmean(values) if values else ""
            row[f"{name}_error"] = standard_error(values) if len(values) > 1 else ""
        p = self.p_value()
        return row | {"p": "" if math.isnan(p) else p, "verdict": self.verdict()}


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a row in percent, and what its runs cost.

    Attributes:
      label: its name.
      last, best: by seed, of the last and of the best evaluation.
      evaluations: how many each run had, of which the best is taken.
      hours: of training, without compiling and evaluating, of all its runs.
      missing: what is not finished; "" for nothing.
    """

    label: str
    last: tuple[float, ...]
    best: tuple[float, ...]
    evaluations: tuple[int, ...]
    hours: float
    missing: str


@dataclasses.dataclass(frozen=True)
class BegunRun:
    """What a run that is there was trained with, and what it cost.

    Attributes:
      settings: by dotted names.
      hours: of training, without compiling and evaluating.
      revision: of the code.
    """

    settings: Mapping[str, Any]
    hours: float
    revision: str


@dataclasses.dataclass(frozen=True)
class PairedSummary:
    """An experiment's scores and differences, one column of its table.

    Attributes:
      table: the planned runs.
      scores: by row.
      differences: by pair.
      begun: the runs that are there, by name.
    """

    table: Table
    scores: tuple[Scores, ...]
    differences: tuple[Difference, ...]
    begun: Mapping[str, BegunRun]

    @property
    def deviation(self) -> float:
        """The standard deviation of differences over seeds: the pairs' median, or NaN.

        A mean over pairs would be that of the few in which an arm collapses.
        """
        known = [each.last for each in self.differences if len(each.last) > 1]
        return statistics.median(map(statistics.stdev, known)) if known else math.nan

    def power(self) -> str:
        """Says which differences a number of seeds lets a t-test find."""
        if math.isnan(self.deviation):
            return (
                "No pair of rows has two seeds yet, so it is not known which "
                "differences could be found."
            )
        shown = ", ".join(
            f"{detectable(self.deviation, seeds):.1f} with {seeds} seeds"
            for seeds in _SEEDS
        )
        return (
            f"Paired differences deviate by {self.deviation:.1f} points from seed to "
            "seed (median of all pairs below). The smallest true differences that "
            f"a paired t-test finds (p < {_LEVEL}) in four of five repetitions are "
            f"{shown}."
        )

    def markdown(self) -> str:
        """The summary as a Markdown page."""
        table = self.table
        parts = [
            f"# {table.name} on {table.dataset}: {table.experiment.title}",
            self.power(),
            "Differences of runs with the same split, order of images and initial "
            "weights, in points, with their standard errors. Verdicts and p: of the "
            f"last evaluation. {CHANCE} Pairs that lack a finite score, or differ in "
            "their data, are left out.",
            markdown_table(
                ("question", "", "minus", "seeds", "last", "best", "p", "verdict"),
                [_difference_cells(each) for each in self.differences],
            ),
            "Scores in %, mean and standard deviation over seeds; best of each run's "
            "evaluations; hours of training, without compiling and evaluating.",
            markdown_table(
                ("", "seeds", "last", "best", "evaluations", "hours", "missing"),
                [_score_cells(each) for each in self.scores],
            ),
        ]
        if table.experiment.note:
            parts.append(table.experiment.note)
        if self.begun:
            parts += self._settings()
        return "\n\n".join(parts) + "\n"

    def _settings(self) -> list[str]:
        """Says with what the runs were trained, of the experiment's settings."""
        common, varied = [], []
        rows = {
            run.name: self.table.rows[cell.row]
            for cell in self.table.cells
            for run in cell.runs
        }
        for key in self.table.experiment.settings.get(self.table.dataset, {}):
            runs = collections.defaultdict(list)
            for name, run in self.begun.items():
                runs[text(run.settings[key])].append(rows[name])
            (usual, _), *others = sorted(runs.items(), key=lambda each: -len(each[1]))
            if others:
                named = (f"{value} in {_counted(labels)}" for value, labels in others)
                varied.append(f"- `{key}`: {'; '.join(named)}; {usual} in the others")
            else:
                common.append(f"`{key}={usual}`")
        parts = [f"Settings of all runs: {', '.join(common)}."] if common else []
        if varied:
            parts.append("Settings in which runs differ:\n\n" + "\n".join(varied))
        return parts

    def drawing(self) -> Drawing:
        """The plot of the differences, and their numbers."""
        rows = [each.as_row() for each in self.differences]
        with style.applied():
            return drawing_of(_plot(self.differences), rows)


def _counted(labels: Sequence[str]) -> str:
    """Returns the names of rows with their numbers of runs."""
    counts = collections.Counter(labels)
    return ", ".join(f"{label} ({quantity(n, 'run')})" for label, n in counts.items())


def detectable(deviation: float, seeds: int) -> float:
    """Computes the true difference that a t-test finds in four of five repetitions.

    For normal differences of this deviation, its statistic has a noncentral t
    distribution, and exceeds Student's quantile with a probability of 0.8.
    """
    least = stats.t.ppf(1 - _LEVEL / 2, seeds - 1)
    errors = special.nctdtrinc(seeds - 1, 1 - _POWER, least)
    return float(errors) * deviation / math.sqrt(seeds)


def standard_error(values: Sequence[float]) -> float:
    """Computes the standard error of the mean of at least two values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def summarize(table: Table, place: Place) -> PairedSummary:
    """Gathers whatever there is of an experiment's runs.

    Raises:
      ValueError: the table has several columns.
    """
    if len(table.columns) != 1:
        raise ValueError(
            f"{table.name} compares runs of one labeled part; --splits names "
            f"{len(table.columns)}"
        )
    cells = {cell.row: cell for cell in table.cells}
    outcomes = {run.name: read_outcome(run, place) for run in table.runs}
    differences = [
        _difference(table, pair, cells, outcomes)
        for pair in table.experiment.pairs
        if pair.row in cells and pair.against in cells
    ]
    begun = {
        run.name: _begun(outcomes[run.name], place.workdir(run))
        for run in table.runs
        if outcomes[run.name].config
    }
    scores = [_scores(table, cell, outcomes, begun) for cell in table.cells]
    return PairedSummary(table, tuple(scores), tuple(differences), begun)


def _difference(
    table: Table,
    pair: Pair,
    cells: Mapping[str, Cell],
    outcomes: Mapping[str, Outcome],
) -> Difference:
    """Compares the finished runs of two rows, seed by seed."""
    found: dict[str, list[float]] = {"last": [], "best": []}
    left_out = 0
    for run, other in zip(cells[pair.row].runs, cells[pair.against].runs, strict=True):
        one, two = outcomes[run.name], outcomes[other.name]
        if not one.state == two.state == "finished":
            continue
        if not (_is_finite(one) and _is_finite(two) and have_same_data(one, two)):
            left_out += 1
            continue
        # Without rounding errors, which a t-test may take for a difference.
        found["last"].append(round(100 * (one.last() - two.last()), 6))
        found["best"].append(round(100 * (one.best() - two.best()), 6))
    return Difference(
        pair,
        table.rows[pair.row],
        table.rows[pair.against],
        tuple(found["last"]),
        tuple(found["best"]),
        left_out,
    )


def _is_finite(outcome: Outcome) -> bool:
    """Whether the last and the best score of a run are numbers."""
    return math.isfinite(outcome.last()) and math.isfinite(outcome.best())


def _scores(
    table: Table,
    cell: Cell,
    outcomes: Mapping[str, Outcome],
    begun: Mapping[str, BegunRun],
) -> Scores:
    """Gathers the scores of one row."""
    done, missing = [], []
    for run in cell.runs:
        outcome = outcomes[run.name]
        if outcome.state == "finished" and _is_finite(outcome):
            done.append(outcome)
        else:
            missing.append(f"seed {run.seed}: {_state(outcome)}")
    hours = [begun[run.name].hours for run in cell.runs if run.name in begun]
    return Scores(
        table.rows[cell.row],
        tuple(100 * outcome.last() for outcome in done),
        tuple(100 * outcome.best() for outcome in done),
        tuple(len(outcome.evaluations) for outcome in done),
        sum(hours),
        ", ".join(missing),
    )


def _state(outcome: Outcome) -> str:
    if outcome.state == "finished":
        return "no finite score"
    if outcome.state == "unfinished":
        return f"step {outcome.step} of {outcome.steps}"
    return f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state


def _begun(outcome: Outcome, directory: Path) -> BegunRun:
    """Reads what a run was trained with, and what it cost."""
    return BegunRun(
        workdir_lib.flatten(workdir_lib.complete(outcome.config)),
        _training_hours(outcome, directory / "metrics.jsonl"),
        str(outcome.manifest.get("revision")),
    )


def _training_hours(outcome: Outcome, metrics: Path) -> float:
    """Computes the hours that a run's steps took, from the speeds that it wrote."""
    config = get_base()
    config.update(workdir_lib.complete(outcome.config))
    data = outcome.manifest["data"]
    facts = DatasetFacts.read(data)
    _, method = build_base(
        config,
        num_classes=facts.num_classes,
        pixels=facts.pixels,
        num_unlabeled=data["unlabeled"],
    )
    images = method.streams.images(config.train.batch_size, config.train.group_size)
    seconds, before = 0.0, 0
    for line in read_metrics(metrics):
        if speed := line.get("train/images_per_second"):
            seconds += (line["step"] - before) * images / speed
            before = line["step"]
    return seconds / 3600


def _difference_cells(each: Difference) -> tuple[str, ...]:
    p = each.p_value()
    left_out = f" ({each.left_out} left out)" if each.left_out else ""
    return (
        each.pair.question,
        each.label,
        each.against,
        f"{len(each.last)}{left_out}",
        _shown(each.last, "+.1f", standard_error),
        _shown(each.best, "+.1f", standard_error),
        "-" if math.isnan(p) else f"{p:.2g}",
        each.verdict(),
    )


def _score_cells(each: Scores) -> tuple[str, ...]:
    return (
        each.label,
        str(len(each.last)),
        _shown(each.last, ".1f", statistics.stdev),
        _shown(each.best, ".1f", statistics.stdev),
        ", ".join(map(str, sorted(set(each.evaluations)))),
        f"{each.hours:.2f}",
        each.missing,
    )


def _shown(values: Sequence[float], form: str, spread: Any) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {spread(values):.1f}" if len(values) > 1 else mean


def _plot(differences: Sequence[Difference]):
    """Draws the differences of last scores of each measured pair: seeds and mean."""
    measured = [each for each in differences if each.last]
    names = [style.wrapped(f"{each.label} - {each.against}", 3.4) for each in measured]
    lines = max((name.count("\n") + 1 for name in names), default=1)
    canvas, (axis,) = style.grid(1, 7.5, 1.4 + (0.12 + 0.2 * lines) * len(names))
    for y, each in enumerate(measured):
        axis.plot(
            each.last,
            [y] * len(each.last),
            "o",
            color=style.SKY,
            markerfacecolor="none",
        )
        error = _ERRORS * standard_error(each.last) if len(each.last) > 1 else 0.0
        mean = statistics.fmean(each.last)
        axis.errorbar(mean, y, xerr=error, fmt="D", color=style.BLUE)
    axis.axvline(0, color=style.GRAY, linestyle=":", marker="")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axis.set_xlabel(f"points at the last evaluation; lines: {_ERRORS} standard errors")
    return canvas
