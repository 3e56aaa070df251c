"""Measures whether lambda_s is higher on right pseudo-labels than on wrong ones.

python -m launch.analyze_lambda --workdir=runs/camvid --checkpoint=last

Predicts the run's unlabeled training images and compares the predictions with their
labels, which training never reads. Writes WORKDIR/trust_<checkpoint>.json.
"""

from launch import cli
from mpmc_jax.analysis import lambda_accuracy
from mpmc_jax.atomic_write import to_json, write_json
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("analyze_lambda", __doc__)
    cli.add_run(parser, checkpoint="last")
    cli.add_data_dir(parser)
    args = parser.parse_args(arguments)
    cli.setup_runtime()
    with cli.user_errors():
        workdir = as_path("--workdir", args.workdir)
        run = runs.load_run(workdir, args.checkpoint)
        run = runs.use_data(run, args.data_dir)
        found = lambda_accuracy.measure(run, workdir)
        path = workdir / f"trust_{args.checkpoint}.json"
        write_json(path, {"step": run.step, **found, "manifest": run.manifest})
        print(to_json(found, indent=2))
        mark = ", on a partial data set" if run.facts.partial else ""
        print(printable(f"written to {path}{mark}"))


if __name__ == "__main__":
    main()
