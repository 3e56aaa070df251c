"""The page of all stages of the evidence: all differences, their p-values, the costs.

`page(place)` reads the runs of stages 1 to 3 and the pages of stage 0 (evidence0.md in
the same folder, or in a folder of it), and leaves out nothing that is there: it links
to the pages (README.md) of runs in folders of their own.
"""

import collections
import dataclasses
import math
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpmc_jax.analysis import paired
from mpmc_jax.analysis.paired import VERDICTS, Difference, PairedSummary
from mpmc_jax.atomic_write import write_text
from mpmc_jax.experiments.paper import base, registry
from mpmc_jax.experiments.paper.results import Place
from mpmc_jax.text import quantity

# Seeds that are looked for.
_SEEDS = range(20)
_COLUMNS = 88
_COMMANDS = """```sh
python -m launch.experiments --name=evidence0 --output=results/evidence RUN...
python -m launch.experiments --name=evidence1 --seeds=0,1,2 --lists=ACDC/splits \\
    --output=results/evidence
```

and the same with `evidence2` and `evidence3`, and `--dataset=camvid` for `--lists`."""
_TITLE = "# Does MPMC help? Measured in runs of minutes"


def _path(place: Place) -> Path:
    return place.folder / "README.md"


def check_replaceable(place: Place) -> None:
    """Checks that the page would replace no other file.

    Raises:
      ValueError: the folder has a README.md that is not such a page.
    """
    path = _path(place)
    if path.exists() and not path.read_text(errors="replace").startswith(_TITLE):
        raise ValueError(
            f"{path} is not a page of this experiment and would be replaced; choose "
            "another --output"
        )


def write(place: Place) -> None:
    """Writes the page as README.md into the folder.

    Raises:
      ValueError: see `check_replaceable`.
    """
    check_replaceable(place)
    write_text(_path(place), page(place))


def summaries(place: Place) -> Iterator[PairedSummary]:
    """Yields the summary of each stage and data set that has a run in the folder.

    Which lists of labeled images its runs have is for the command that trained them to
    say: those of any data are taken, and pairs compare runs of the same.
    """
    place = dataclasses.replace(place, data=None)
    for name, experiment in registry.OWN.items():
        for dataset in experiment.settings:

            def plan(*seeds: int, name=name, experiment=experiment, dataset=dataset):
                return base.plan(name, experiment, dataset=dataset, seeds=seeds)

            seeds = [
                seed
                for seed in _SEEDS
                if any(place.workdir(run).is_dir() for run in plan(seed).runs)
            ]
            if seeds:
                yield paired.summarize(plan(*seeds), place)


def page(place: Place) -> str:
    """Makes the page as Markdown."""
    found = list(summaries(place))
    parts = [
        _TITLE,
        _summary(found),
        *(f"On {_where(each)}: {each.power()}" for each in found),
        _COMMANDS,
        "## Differences",
        paired.CHANCE,
        _corrected(found),
        _verdicts(found),
        _not_run(found),
        _costs(found),
        _others(place.folder),
    ]
    for pattern in ("evidence0.md", "*/evidence0.md"):
        for path in sorted(place.folder.glob(pattern)):
            folder = path.parent.relative_to(place.folder).as_posix()
            parts.append(_lowered(_moved_from(folder, path.read_text())))
    parts += [_lowered(each.markdown()) for each in found]
    return _in_lines("\n\n".join(part.strip() for part in parts if part))


def _in_lines(text: str) -> str:
    """Breaks lines that are too long; those of tables and commands stay."""
    lines, is_code = [], False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if is_code or line.startswith("|"):
            lines.append(line)
            continue
        lines += textwrap.wrap(
            line,
            _COLUMNS,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines) + "\n"


def _summary(found: list[PairedSummary]) -> str:
    """Says in a sentence whether MPMC helps, by all its forms that were run."""
    forms = {}
    for each in found:
        for difference in each.differences:
            row = each.table.experiment.rows[difference.pair.row]
            if difference.last and _adds_mpmc(each.table.experiment, difference.pair):
                # Stages share runs.
                form = str((each.table.dataset, row.argument, row.settings))
                forms[form] = difference.verdict()
    if not forms:
        return (
            "**Not known yet**: no training with MPMC has been run beside the same one "
            "without, so nothing here says whether MPMC helps."
        )
    counts = collections.Counter(forms.values())
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    return (
        f"Of {quantity(len(forms), 'training')} with a form of MPMC, compared with the "
        f"same without: {said}."
    )


def _adds_mpmc(experiment: base.Experiment, pair: base.Pair) -> bool:
    """Whether two rows differ in MPMC alone, which the second does not have."""
    row, against = (experiment.rows[name] for name in (pair.row, pair.against))

    def rest(choice: base.Choice) -> dict[str, Any]:
        settings = choice.settings.items()
        others = {k: v for k, v in settings if not k.startswith("mpmc.")}
        return others | {"method": choice.argument["method"]}

    used = row.argument["mpmc"], against.argument["mpmc"]
    return used[0] != "off" == used[1] and rest(row) == rest(against)


def _where(found: PairedSummary) -> str:
    return f"{found.table.dataset}, stage {found.table.name[-1]}"


def _moved_from(folder: str, text: str) -> str:
    """Makes links to files relative to the folder above, not to `folder`."""

    def link(found: re.Match[str]) -> str:
        return f"]({posixpath.normpath(posixpath.join(folder, found[1]))})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", link, text)


def _others(folder: Path) -> str:
    """Links to the pages of runs that are not among the experiments'."""
    lines = []
    for path in sorted(folder.glob("*/README.md")):
        title = path.read_text().splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}]({path.relative_to(folder).as_posix()})")
    return "Runs with other settings:\n\n" + "\n".join(lines) if lines else ""


def _lowered(text: str) -> str:
    """Lowers the page's first heading by one level."""
    return f"#{text}"


def _corrected(found: list[PairedSummary]) -> str:
    """Says how small the smallest p-value is among so many."""
    values = [each.p_value() for one in found for each in one.differences]
    known = [p for p in values if not math.isnan(p)]
    if not known:
        return ""
    return (
        f"The smallest p of these {quantity(len(known), 'pair')} is {min(known):.2g}, "
        f"and {min(1.0, len(known) * min(known)):.2g} if corrected for their number "
        "(Bonferroni)."
    )


def _verdicts(found: list[PairedSummary]) -> str:
    """Lists every pair that has a run, by verdict."""
    lines = {verdict: [] for verdict in VERDICTS}
    for each in found:
        for difference in each.differences:
            if difference.last:
                line = f"- {_where(each)}: {_said(difference)}"
                lines[difference.verdict()].append(line)
    parts = [
        f"{verdict.capitalize()}:\n\n" + "\n".join(own)
        for verdict, own in lines.items()
        if own
    ]
    return "\n\n".join(parts) or "No pair has been run."


def _not_run(found: list[PairedSummary]) -> str:
    """Lists the pairs without a single seed, by stage and data set."""
    begun = {_where(each): each for each in found}
    lines = []
    for name, experiment in registry.OWN.items():
        for dataset in experiment.settings:
            where = f"{dataset}, stage {name[-1]}"
            measured = {
                difference.pair
                for difference in (begun[where].differences if where in begun else ())
                if difference.last
            }
            pairs = [pair for pair in experiment.pairs if pair not in measured]
            if pairs:
                named = ", ".join(f"{pair.row} - {pair.against}" for pair in pairs)
                lines.append(f"- {where}: {named}")
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _said(difference: Difference) -> str:
    mean, error = (difference.as_row()[f"last_{name}"] for name in ("mean", "error"))
    number = f"{mean:+.1f}" + ("" if error == "" else f" ± {error:.1f}")
    seeds = quantity(len(difference.last), "seed")
    if len(difference.last) > 1:
        seeds += ": " + ", ".join(f"{each:+.1f}" for each in difference.last)
    if not math.isnan(p := difference.p_value()):
        seeds += f"; p = {p:.2g}"
    if difference.left_out:
        seeds += f"; {difference.left_out} without a finite score"
    return (
        f"{difference.pair.question} {difference.label} minus {difference.against}: "
        f"{number} ({seeds})"
    )


def _costs(found: list[PairedSummary]) -> str:
    """Says how many hours all runs trained, and by which revisions."""
    # Stages share runs.
    runs = {name: run for each in found for name, run in each.begun.items()}
    hours = sum(run.hours for run in runs.values())
    revisions = sorted({run.revision[:7] for run in runs.values()})
    return (
        f"Costs: {hours:.1f} hours of training in {quantity(len(runs), 'run')}, "
        f"without compiling and evaluating. Revisions: {', '.join(revisions) or '-'}."
    )
