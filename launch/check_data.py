"""Finds problems of a data set before training, counts its labels, and judges them.

    python -m launch.check_data --dataset=folder --source=DIR [--classes=road,car]
    python -m launch.check_data --dataset=folder --data_dir=DIR        once prepared

Prints one line for every problem and exits with 1 if there is any. Labels of a source
that can be read, but seem to be wrong, are warnings and notes. --html writes all of it
as a page with pictures; --workdir compares the labels with what a run predicts.
"""

import argparse

from launch import cli
from mpmc_jax.atomic_write import write_text
from mpmc_jax.data import check, verify
from mpmc_jax.data.check import Report
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.data.doctor import diagnose, page
from mpmc_jax.data.doctor.evidence import examine
from mpmc_jax.data.source import Source
from mpmc_jax.experiments import label_check
from mpmc_jax.experiments.run import load_run
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("check_data", __doc__)
    cli.add_source(parser)
    parser.add_argument(
        "--data_dir",
        default="",
        help="check a prepared data set, not a source",
    )
    parser.add_argument(
        "--workdir", default="", help="a trained run to compare the labels with"
    )
    parser.add_argument(
        "--html", default="", metavar="FILE", help="write a page with pictures too"
    )
    args = parser.parse_args(arguments)
    with cli.user_errors():
        if args.data_dir and args.source:
            raise ValueError("--source and --data_dir: give one, the data to check")
        for name in ("classes", "unlabeled", "workdir", "html"):
            if args.data_dir and getattr(args, name):
                raise ValueError(f"--{name}: is for --source, not for prepared data")
        if args.data_dir:
            data_dir = as_path("--data_dir", args.data_dir)
            info = open_dataset(str(data_dir), args.dataset)
            report = verify.check(info)
            _print(report, info.facts.class_names, verify.summary(info))
        else:
            report = _check_source(args)
        if report.problems:
            raise ValueError(check.failure(report))
        print("No problem found.")


def _check_source(args: argparse.Namespace) -> Report:
    """Checks a source and its labels, prints the result and writes the page."""
    page_path = as_path("--html", args.html) if args.html else None
    if page_path is not None:  # Before the work.
        if page_path.is_dir():
            raise ValueError(f"--html={page_path} is a folder; name a file in it")
        page_path.parent.mkdir(parents=True, exist_ok=True)
    source = cli.read_source(args, cli.class_names(args))
    report = check.check_source(source, examine)
    findings = diagnose.diagnose(source, report.evidence)
    if args.workdir:
        findings += _compare(args, source)
    summary = check.summary(source)
    _print(report, source.class_names, summary)
    for finding in findings:
        print(f"{finding.level}: {printable(finding.text)}")
    if page_path is not None:
        write_text(page_path, page.render(source, report, findings, summary))
        print(f"{page_path} written")
    return report


def _print(report: Report, class_names: tuple[str, ...], summary: str) -> None:
    # Where no mask could be read, only the problems are worth a line.
    if report.images.any() or not report.problems:
        print(f"{summary}\n{report.table(class_names)}")


def _compare(args: argparse.Namespace, source: Source) -> list[diagnose.Finding]:
    cli.setup_runtime()
    run = load_run(as_path("--workdir", args.workdir))
    return label_check.find_disagreements(run, source)


if __name__ == "__main__":
    main()
