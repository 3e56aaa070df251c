"""Draws curves and writes a table of runs.

python -m launch.plot_runs --output=results/camvid_cpu runs/supervised runs/unimatch

Writes curves.png, curves.svg, curves.csv and table.md, and copies each run's
config.json, manifest.json, metrics.jsonl, eval_*.json and trust_*.json to OUTPUT/<run>.
Results of an earlier call are replaced, and counted.
"""

from launch import cli
from mpmc_jax.analysis import curves
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable, quantity


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("plot_runs", __doc__)
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("runs", nargs="+", help="directories of runs")
    args = parser.parse_args(arguments)
    with cli.user_errors():
        runs = [as_path("RUN", run) for run in args.runs]
        output = as_path("--output", args.output)
        table, replaced = curves.compare(runs, output)
        print(printable(table, "\n"))
        again = f"; {quantity(replaced, 'file')} of an earlier call replaced"
        print(printable(f"written to {output}{again if replaced else ''}"))


if __name__ == "__main__":
    main()
