r"""Evaluates a checkpoint of a run on a labelled split.

python -m launch.evaluate --workdir=runs/camvid [--checkpoint=best|last|STEP] \
    [--split=val]

Prints a table and writes WORKDIR/eval_<split>_<checkpoint>.json.
"""

import json
import pathlib

import jax

from launch import cli, runs
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.training import report


def evaluate(run: runs.Run, split: str) -> EvalResult:
    """Evaluates an opened run on one split of its data set."""
    evaluator = runs.make_evaluator(run.config, run.module, run.facts)
    return evaluator.run(run.variables, runs.open_split(run, split), run.probe)


def record(run: runs.Run, split: str, result: EvalResult) -> dict:
    """What is written of an evaluation: figures, counts and circumstances."""
    return {
        "split": split,
        "partial": run.facts.partial,
        "step": run.step,
        "network": run.network_name,
        "pad_to": result.pad_to,
        "num_images": result.num_images,
        "seconds": result.seconds,
        "class_names": list(run.facts.class_names),
        "scalars": result.scalars(run.facts.class_names),
        "confusion": result.confusion.tolist(),
        "run": run.manifest,
        "manifest": report.manifest(
            run.config.seed,
            {
                "dataset": run.facts.dataset,
                "fingerprint": run.facts.fingerprint,
                "partial": run.facts.partial,
            },
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    parser = cli.parser("evaluate", __doc__)
    cli.add_run(parser)
    parser.add_argument("--split", default="val", help="split to evaluate on")
    args = parser.parse_args(arguments)
    cli.keep_compiled_programs()
    with cli.user_errors():
        run = runs.open_run(args.workdir, args.checkpoint)
        result = evaluate(run, args.split)
    if jax.process_index() > 0:
        return
    mark = ", partial data set" if run.facts.partial else ""
    print(f"{args.split}, {run.network_name} of step {run.step}{mark}")
    print(format_table(result, run.facts.class_names))
    path = pathlib.Path(args.workdir, f"eval_{args.split}_{args.checkpoint}.json")
    path.write_text(json.dumps(record(run, args.split, result), indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
