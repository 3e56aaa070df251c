r"""Runs an experiment, of the paper or our own, or draws a figure from saved runs.

python -m launch.experiments --list
python -m launch.experiments --name=table6 [--dataset=camvid --splits=1_8,1_4] \
    [--seeds=0,1,2] [--steps=2000] [--only=off,both] [--backbone=resnet18] \
    [--mpmc=recommended] [--lists=DIR] [--jobs=1] [--output=runs/paper] \
    [--config.KEY=VALUE ...] [--dry_run | --print_commands | --summarize]
python -m launch.experiments --name=evidence1 [--dataset=camvid] ...
python -m launch.experiments --name=curves --output=results/mine runs/a runs/b
python -m launch.experiments --name=panels --options=images=2 --output=out runs/a

An experiment trains its runs into OUTPUT/runs/, skips what is finished, resumes what is
not, and goes on after a run that fails. It then writes OUTPUT/<name>.md, .csv, .png and
.svg: ours beside the published values. Where training evaluates in another way than the
published values were computed, the best checkpoint of each finished run is evaluated
once more. evidence1 to evidence3 are our own and write OUTPUT/<name>_<dataset>.*, by
default in runs/evidence: differences of pairs of runs of equal seeds. README.md beside
them has all of their stages that are there, and evidence0.md. A directory that holds a
run of that name with other settings or data is refused.
--config.KEY=VALUE is passed on to every run; {backbone} in it stands for the run's own.
--dry_run prints the commands and the hours that they will take; --print_commands prints
one line per run, for launch/slurm.sh or launch/tpu_pod.sh; --summarize gathers whatever
is there.

A figure of runs writes OUTPUT/<name>.png, .svg, and its numbers as .csv.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from launch import cli
from launch.experiments import hours, processes
from mpmc_jax.analysis import base, evidence_page, paired, registry, summary
from mpmc_jax.atomic_write import write_text
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.registry import DATASETS
from mpmc_jax.experiments import config_checks
from mpmc_jax.experiments.paper.base import PlannedRun, Table, plan
from mpmc_jax.experiments.paper.final_evaluation import final_evaluation, is_due
from mpmc_jax.experiments.paper.registry import all_experiments
from mpmc_jax.experiments.paper.results import Place, other_run, read_outcome
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity
from mpmc_jax.training.workdir import has_steps

# The arguments that replace parts of a configuration's argument.
_CHANGES = ("backbone", "model", "crop", "mpmc", "lists")
_MODES = ("dry_run", "print_commands", "summarize")
# By what is made: the arguments that act on it alone.
_OF_EXPERIMENTS = (
    *("dataset", "splits", "seeds", "steps", "only", "jobs"),
    *_CHANGES,
    *_MODES,
)
_OF_FIGURES = ("checkpoint", "options")
# The module that runs another one and ends with this process.
_CHILD = "launch.experiments.child"


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    args, more = _parser().parse_known_args(arguments)
    if args.list:
        _list()
        return
    cli.setup_runtime()
    with cli.user_errors():
        unknown = [each for each in more if not each.startswith("--config.")]
        if unknown:
            raise ValueError(f"unexpected arguments {unknown}; --help lists them")
        if args.runs:
            _check_given(args, _OF_EXPERIMENTS, "is for experiments, not for figures")
            if more:
                raise ValueError(f"{more[0]} is for experiments, not for figures")
            _draw(args)
        elif args.name in all_experiments():
            _check_given(args, _OF_FIGURES, "is for figures, not for experiments")
            if failed := _run(args, more):
                sys.exit(f"error: {quantity(failed, 'run')} failed")
        elif args.name in registry.FIGURES:
            raise ValueError("name the directory of at least one run")
        elif not args.name:
            raise ValueError("give --name=NAME; --list lists the names")
        else:
            valid = ", ".join({**all_experiments(), **registry.FIGURES})
            raise ValueError(f"--name={args.name} is unknown; valid: {valid}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("experiments", __doc__)
    parser.add_argument("--list", action="store_true", help="list all names")
    parser.add_argument("--name", default="", help="experiment or figure, see --list")
    parser.add_argument("--output", default="", help="folder for the results")
    cli.add_data_dir(parser)
    of_experiments = parser.add_argument_group("experiments")
    for name, text in (
        ("dataset", "instead of the paper's"),
        ("splits", "labeled parts, A,B; the columns"),
        ("seeds", "A,B; a run for each (0)"),
        ("only", "rows, A,B"),
        ("backbone", "instead of the paper's"),
        ("model", "network, as in a configuration's argument"),
        ("crop", "side of the training crops"),
        ("mpmc", "recommended, instead of paper"),
        ("lists", "folder of published lists of labeled images"),
    ):
        of_experiments.add_argument(f"--{name}", default="", help=text)
    of_experiments.add_argument(
        "--steps", type=int, default=0, help="length of each run; evaluated five times"
    )
    of_experiments.add_argument("--jobs", type=int, default=0, help="runs at once (1)")
    for name, text in (
        ("dry_run", "print commands and hours"),
        ("print_commands", "print a line per run for a cluster"),
        ("summarize", "train nothing, gather what is there"),
    ):
        of_experiments.add_argument(f"--{name}", action="store_true", help=text)
    of_figures = parser.add_argument_group("figures")
    of_figures.add_argument(
        "--checkpoint", default="", help="best, last, a step or all"
    )
    of_figures.add_argument("--options", default="", help="KEY=VALUE,... of the figure")
    of_figures.add_argument("runs", nargs="*", help="directories of runs")
    return parser


def _check_given(args: argparse.Namespace, names: Sequence[str], text: str) -> None:
    """Raises ValueError if one of the arguments is given."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name} {text}")


def _list() -> None:
    """Prints all experiments and figures, a line each."""
    print("experiments")
    for name, experiment in all_experiments().items():
        print(f"  {name:16} {experiment.title} ({experiment.dataset})")
        print(f"  {'':16} rows: {', '.join(experiment.rows)}")
    print("figures, of saved runs")
    for name, figure in registry.FIGURES.items():
        options = ",".join(f"{k}={v}" for k, v in base.default_options(figure).items())
        what = (figure.__doc__ or "").splitlines()[0]
        shown = f" Options: {options}" if options else ""
        print(f"  {name:16} {what}{shown}")


def _draw(args: argparse.Namespace) -> None:
    """Draws a figure from saved runs."""
    paths = registry.make(
        args.name,
        args.runs,
        args.output,
        checkpoint=args.checkpoint,
        data_dir=args.data_dir,
        options=_parse_options(args.options),
    )
    print(printable(f"written: {', '.join(map(str, paths))}"))


def _parse_options(text: str) -> dict[str, str]:
    """Parses KEY=VALUE,...; see `registry.build_figure` for what they may be.

    Raises:
      ValueError: a part without "=".
    """
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--options={text}: {part!r} is not KEY=VALUE")
        options[key] = value
    return options


def _run(args: argparse.Namespace, more: Sequence[str]) -> int:
    """Plans an experiment and does with it what is asked; returns how many failed."""
    table = _plan(args)
    settings = _settings(args, more)
    own = bool(table.experiment.pairs)
    output = args.output or ("runs/evidence" if own else "runs/paper")
    place = Place(
        as_path("--output", output), lambda run: _configuration(_flags(run, settings))
    )
    if own:
        evidence_page.check_replaceable(place)
    # Whatever is wrong with the settings shows before the first run.
    configs = {run.name: place.configure(run) for run in table.runs}
    for run in () if args.summarize else table.runs:
        if other := other_run(run, place):
            raise ValueError(f"{place.workdir(run)} {other}")
    commands = {
        run.name: [
            "launch.train",
            *_flags(run, settings),
            f"--workdir={place.workdir(run)}",
        ]
        for run in table.runs
    }
    if args.print_commands:
        for command in commands.values():
            print(shlex.join(command))
        return 0
    if args.dry_run:
        _print_hours(table, commands, configs, place)
        return 0
    if args.jobs < 0:
        raise ValueError(f"--jobs={args.jobs}: at least 1 is needed")
    failed = 0
    if not args.summarize:
        _check_runs(table, configs, place)
        failed = processes.train_all(
            table.runs,
            {
                name: [sys.executable, "-m", _CHILD, *command]
                for name, command in commands.items()
            },
            place,
            args.jobs or 1,
            _evaluations(table, configs, place),
        )
    _write_summary(table, place)
    return failed


def _evaluations(
    table: Table, configs: Mapping[str, ml_collections.ConfigDict], place: Place
) -> dict[str, list[str]]:
    """Returns the commands of the final evaluations, where values are published."""
    commands = {}
    for run in table.runs if table.source else ():
        if evaluation := final_evaluation(configs[run.name]):
            commands[run.name] = [
                *(sys.executable, "-m", _CHILD, "launch.evaluate"),
                f"--workdir={place.workdir(run)}",
                f"--data_dir={configs[run.name].data.data_dir}",
                *evaluation.flags,
            ]
    return commands


def _plan(args: argparse.Namespace) -> Table:
    """Plans the runs that the arguments ask for.

    Raises:
      ValueError: an argument that is not valid.
    """
    if sum(getattr(args, name) for name in _MODES) > 1:
        raise ValueError(f"one of {', '.join(f'--{name}' for name in _MODES)} at most")
    if args.dataset and args.dataset not in DATASETS:
        valid = ", ".join(DATASETS)
        raise ValueError(f"--dataset={args.dataset} is unknown; valid: {valid}")
    try:
        seeds = [int(seed) for seed in (args.seeds or "0").split(",")]
    except ValueError:
        raise ValueError(f"--seeds={args.seeds}: whole numbers, A,B") from None
    return plan(
        args.name,
        all_experiments()[args.name],
        dataset=args.dataset,
        splits=_names(args.splits),
        seeds=seeds,
        only=_names(args.only),
        changes={name: getattr(args, name) for name in _CHANGES if getattr(args, name)},
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _settings(args: argparse.Namespace, more: Sequence[str]) -> list[str]:
    """Returns the flags that every run gets; later ones win.

    Raises:
      ValueError: an unknown key, or a negative number of steps.
    """
    config_checks.check_keys(more)
    if bare := [each for each in more if "=" not in each]:
        raise ValueError(f"{bare[0]}: expected --config.KEY=VALUE")
    found = []
    if args.data_dir:
        found.append(f"--config.data.data_dir={args.data_dir}")
    if args.steps < 0:
        raise ValueError(f"--steps={args.steps} must be positive")
    if args.steps:
        every = math.ceil(args.steps / 5)
        found += [
            f"--config.train.steps={args.steps}",
            f"--config.train.eval_every={every}",
            f"--config.train.checkpoint_every={every}",
        ]
    return [*found, *more]


def _flags(run: PlannedRun, settings: Sequence[str]) -> list[str]:
    """The flags of a run; the row's own settings win over those of all runs."""
    backbone = run.argument.get("backbone", "")
    return run.flags([each.replace("{backbone}", backbone) for each in settings])


def _configuration(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Parses the flags of a run as `launch.train` does.

    Raises:
      ValueError: a value that is not valid or does not act.
    """
    values, argv = flags.FlagValues(), ["launch.train", *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    try:
        values(argv)
        config = holder.value
    except (flags.Error, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{shlex.join(arguments)}: {reason}") from error
    config_checks.check_epochs(arguments, config)
    config_checks.expand_paths(config)
    config_checks.check_ranges(config)
    return config


def _check_runs(
    table: Table, configs: Mapping[str, ml_collections.ConfigDict], place: Place
) -> None:
    """Checks the runs that are left before the first one trains.

    Raises:
      FileNotFoundError: a data set is not prepared.
      ValueError: a run to come has settings that nothing reads.
    """
    for run in table.runs:
        if not has_steps(place.workdir(run)):
            config_checks.check_read(configs[run.name])
    left = [
        run
        for run in table.runs
        if read_outcome(run, place).state != "finished"
        or (table.source and is_due(run, place))
    ]
    data = [configs[run.name].data for run in left]
    for data_dir, name in dict.fromkeys((each.data_dir, each.name) for each in data):
        open_dataset(data_dir, name)


def _print_hours(
    table: Table,
    commands: Mapping[str, Sequence[str]],
    configs: Mapping[str, ml_collections.ConfigDict],
    place: Place,
) -> None:
    """Prints the hours and the command of each run, and the sum of the hours."""
    estimator = hours.Estimator(place)
    total = 0.0
    for run in table.runs:
        found = estimator.hours(run, configs[run.name])
        total += 0.0 if math.isnan(found.hours) else found.hours
        command = shlex.join(["python", "-m", *commands[run.name]])
        done = read_outcome(run, place).state
        kind = "on one H100" if found.kind == "modeled" else found.kind
        print(f"{_hours(found.hours)} {kind}, {done}: {command}", flush=True)
    print(
        f"{_hours(total)} in all, {quantity(len(table.runs), 'run')}. Measured: at the "
        "speed so far; on one H100: modeled, in bfloat16 (docs/reproduce.md); a CPU "
        "takes thousands of times as long."
    )


def _hours(hours: float) -> str:
    """Formats hours in a column."""
    return f"{'< 0.01' if 0 < hours < 0.01 else f'{hours:.2f}':>8} h"


def _write_summary(table: Table, place: Place) -> None:
    """Writes and prints the summary, and draws the experiment's figure."""
    if table.experiment.pairs:
        _write(paired.summarize(table, place), place, f"{table.name}_{table.dataset}")
        evidence_page.write(place)
        return
    paper = plan(table.name, table.experiment)
    configs = [_configuration(run.flags()).to_dict() for run in paper.runs]
    found = summary.summarize(table, place, configs)
    _write(found, place, table.name)
    name = table.experiment.figure
    if name and not any(line.state for line in found.lines):
        first = {cell.row: cell.runs[0] for cell in reversed(table.cells)}
        runs = [str(place.workdir(first[row])) for row in table.rows]
        paths = registry.make(name, runs, str(place.folder / "figures"))
        print(printable(f"written: {', '.join(map(str, paths))}"))


def _write(
    found: summary.Summary | paired.PairedSummary, place: Place, name: str
) -> None:
    """Writes a summary's page, plot and numbers, and prints the page."""
    text, stem = found.markdown(), place.folder / name
    place.folder.mkdir(parents=True, exist_ok=True)
    write_text(place.folder / f"{name}.md", text)
    found.drawing().write(stem)
    print(printable(text, keep="\n"))
    print(printable(f"written: {stem}.md, .csv, .png, .svg"))


if __name__ == "__main__":
    main()
