"""An experiment: rows and columns of training runs.

One of the paper is one file of this folder, one line of `registry.EXPERIMENTS`, and the
published values in `published/<name>.toml`. One of our own compares pairs of rows, and
has a line of `registry.OWN` and no published values.
"""

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PUBLISHED = Path(__file__).parent / "published"
# The order of the keys in a configuration's argument.
_ARGUMENT = ("method", "mpmc", "backbone", "model", "crop", "split", "lists")
# Which of them name a run; "lists" is a path of the user's machine.
_NAMING = _ARGUMENT[:-1]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a row or a column of a table sets.

    Attributes:
      label: its name in the table.
      argument: parts of the configuration's argument, such as {"method": "unimatch"}.
      settings: further settings by their dotted names.
      baseline: id of the row that a row is compared with; "" for none.
    """

    label: str
    argument: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    baseline: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two rows that differ in one thing.

    Attributes:
      row: id of the row.
      against: id of the row that it is compared with.
      question: what their difference answers.
    """

    row: str
    against: str
    question: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table of the paper, or of our own.

    Attributes:
      title: what it compares, in one line.
      dataset: the paper's data set, or the first of our own.
      rows: by id.
      columns: by id; each sets a split of the paper's data set.
      per_class: whether the table has a column for each class.
      figure: the figure of `analysis` that the runs are drawn as; "" for none.
      note: what a reader must know to compare with the paper.
      pairs: our own: rows whose runs of equal seeds are compared; empty in the paper's.
      settings: our own: by data set, settings of all runs. Those of the command line
        and of a row replace them.
      parts: our own: by data set, the labeled part that is its column.
    """

    title: str
    dataset: str
    rows: Mapping[str, Choice]
    columns: Mapping[str, Choice]
    per_class: bool = False
    figure: str = ""
    note: str = ""
    pairs: tuple[Pair, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One training run: a data set's configuration with an argument and settings.

    Attributes:
      dataset: the data set.
      argument: parts of the configuration's argument.
      settings: those of the row.
      seed: the run's seed.
      common: settings of all runs of the experiment.
    """

    dataset: str
    argument: Mapping[str, str]
    settings: Mapping[str, Any]
    seed: int
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config_argument(self) -> str:
        """The argument of the configuration file: "method=unimatch,mpmc=paper,..."."""
        given = self.argument
        return ",".join(f"{key}={given[key]}" for key in _ARGUMENT if key in given)

    @property
    def name(self) -> str:
        """A name for the run's directory, which no other run of the experiment has.

        It leaves out what all runs have in common, so that experiments share runs; see
        `results.other_run` for directories of runs with other settings or data.
        """
        parts = [self.dataset, *(self.argument.get(key, "") for key in _NAMING)]
        parts += [f"{key}={text(value)}" for key, value in self.settings.items()]
        parts.append(f"seed{self.seed}")
        return re.sub(r"[^\w.=-]+", "_", "-".join(filter(None, parts)))

    def flags(self, more: Sequence[str] = ()) -> list[str]:
        """The flags of `launch.train` that choose the configuration and settings.

        Args:
          more: flags that replace the experiment's settings, but not the row's.
        """
        return [
            f"--config=configs/{self.dataset}.py:{self.config_argument}",
            *_setting_flags(self.common),
            *more,
            *_setting_flags({**self.settings, "seed": self.seed}),
        ]


def _setting_flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={text(value)}" for key, value in settings.items()]


def text(value: Any) -> str:
    """Writes a setting as the command line takes it."""
    return str(value).replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
      row, column: ids.
      runs: its runs, one for each seed.
      baseline: row that it is compared with; "" for none.
      published: the paper's value; NaN where there is none.
    """

    row: str
    column: str
    runs: tuple[PlannedRun, ...]
    baseline: str = ""
    published: float = math.nan


@dataclasses.dataclass(frozen=True)
class Table:
    """An experiment on a data set: its cells, and what they are called.

    Attributes:
      name: name of the experiment.
      experiment: the experiment.
      dataset: the data set that it runs on.
      rows, columns: labels by id, in the table's order.
      cells: one for each row and column.
      published_classes: row -> class -> the paper's value.
      source: where in the paper the published values stand.
    """

    name: str
    experiment: Experiment
    dataset: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    cells: tuple[Cell, ...]
    published_classes: Mapping[str, Mapping[str, float]]
    source: str

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """All runs, each once, in the table's order."""
        named = {run.name: run for cell in self.cells for run in cell.runs}
        return tuple(named.values())


def read_published(name: str) -> dict[str, Any]:
    """Reads the published values of an experiment.

    Returns:
      "source", "columns" (ids) and "rows" (id -> values, in the order of the columns);
      "classes" (row -> class -> value) where the table has columns for classes.
    """
    return tomllib.loads((_PUBLISHED / f"{name}.toml").read_text())


def plan(
    name: str,
    experiment: Experiment,
    *,
    dataset: str = "",
    splits: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    only: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
) -> Table:
    """Plans the runs of an experiment.

    Args:
      name: its name, see `registry.EXPERIMENTS`.
      experiment: the experiment.
      dataset: the data set; "" for the paper's. Published values are those of the
        paper's.
      splits: columns: ids of the experiment's, or labeled parts such as "1_16". Empty
        for all of the experiment's; on another data set for its `parts`, or 1_8.
      seeds: a run for each.
      only: ids of rows; empty for all.
      changes: parts of the configuration's argument that replace the experiment's own,
        such as {"backbone": "resnet18"}. Rows that become equal are kept once.

    Raises:
      ValueError: an unknown row, no seed, or seeds that repeat.
    """
    dataset = dataset or experiment.dataset
    _check(name, experiment, seeds, only)
    ours = dataset == experiment.dataset
    columns = _columns(experiment, splits, dataset)
    rows = _rows(experiment, only, changes or {})
    published = {"rows": {}, "columns": []}
    if ours and not experiment.pairs:
        published = read_published(name)
    common = experiment.settings.get(dataset, {})
    cells = []
    for (row, choice), (column, part) in itertools.product(
        rows.items(), columns.items()
    ):
        argument = {**choice.argument, **part.argument}
        runs = tuple(
            PlannedRun(dataset, argument, choice.settings, seed, common)
            for seed in seeds
        )
        values = dict(
            zip(published["columns"], published["rows"].get(row, ()), strict=False)
        )
        baseline = choice.baseline if choice.baseline in rows else ""
        cells.append(Cell(row, column, runs, baseline, values.get(column, math.nan)))
    return Table(
        name,
        experiment,
        dataset,
        {row: choice.label for row, choice in rows.items()},
        {column: choice.label for column, choice in columns.items()},
        tuple(cells),
        published.get("classes", {}),
        published.get("source", ""),
    )


def _check(
    name: str, experiment: Experiment, seeds: Sequence[int], only: Sequence[str]
) -> None:
    """Raises ValueError unless the rows exist and the seeds are distinct."""
    if unknown := [row for row in only if row not in experiment.rows]:
        raise ValueError(
            f"--only: {name} has no row {unknown[0]!r}; valid: "
            f"{', '.join(experiment.rows)}"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(map(str, seeds))}: distinct numbers")


def _rows(
    experiment: Experiment, only: Sequence[str], changes: Mapping[str, str]
) -> dict[str, Choice]:
    """Returns the rows with `changes` made, each configuration once."""
    changed = dict(changes)
    mode = changed.pop("mpmc", "")
    rows, seen = {}, set()
    for row, choice in experiment.rows.items():
        argument = {**choice.argument, **changed}
        # A row that has no MPMC keeps having none.
        if mode and argument.get("mpmc", "off") != "off":
            argument["mpmc"] = mode
        key = repr((sorted(argument.items()), sorted(choice.settings.items())))
        if (not only or row in only) and key not in seen:
            seen.add(key)
            rows[row] = dataclasses.replace(choice, argument=argument)
    return rows


def _columns(
    experiment: Experiment, splits: Sequence[str], dataset: str
) -> dict[str, Choice]:
    """Returns the experiment's columns, or one for each of `splits`.

    Args:
      experiment: the experiment.
      splits: ids of columns if the data set is the paper's, or labeled parts.
      dataset: the data set.
    """
    own = dict(experiment.columns) if dataset == experiment.dataset else {}
    if not splits:
        part = experiment.parts.get(dataset, "1_8")
        return own or {part: labeled_part(part)}
    return {split: own.get(split, labeled_part(split)) for split in splits}


def labeled_part(split: str) -> Choice:
    """Returns the column of a labeled part such as "1_16"."""
    return Choice(split.replace("_", "/"), {"split": split})
