r"""Evaluates a checkpoint of a run on a labelled split.

python -m launch.evaluate --workdir=runs/camvid [--checkpoint=best|last|STEP] \
    [--split=val]

Prints a table and writes WORKDIR/eval_<split>_<checkpoint>.json.
"""

import argparse
import json
import pathlib
import sys

import jax

from launch import runs
from launch.cache import keep_compiled_programs
from mpmc_jax.data.build import build_eval
from mpmc_jax.evaluation.evaluator import EvalResult
from mpmc_jax.evaluation.table import format_table
from mpmc_jax.training import report
from mpmc_jax.training.checkpoint import CheckpointError
from mpmc_jax.training.workdir import WorkdirError


def evaluate(run: runs.Run, split: str) -> EvalResult:
    """Evaluates an opened run on one split of its data set."""
    evaluator = runs.make_evaluator(run.config, run.module, run.info.num_classes)
    return evaluator.run(run.variables, build_eval(run.config, split), run.probe)


def record(run: runs.Run, split: str, result: EvalResult) -> dict:
    """What is written of an evaluation: figures, counts and circumstances."""
    return {
        "split": split,
        "step": run.step,
        "network": run.network_name,
        "pad_to": result.pad_to,
        "num_images": result.num_images,
        "seconds": result.seconds,
        "class_names": list(run.info.class_names),
        "scalars": result.scalars(run.info.class_names),
        "confusion": result.confusion.tolist(),
        "run": run.manifest,
        "manifest": report.manifest(
            run.config.seed,
            {"dataset": run.info.name, "fingerprint": run.info.fingerprint},
        ),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--split", default="val", help="split to evaluate on")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; user errors end with one line and status 1."""
    args = parse(arguments)
    keep_compiled_programs()
    try:
        run = runs.open_run(args.workdir, args.checkpoint)
        result = evaluate(run, args.split)
    except (ValueError, FileNotFoundError, CheckpointError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    if jax.process_index() > 0:
        return
    print(f"{args.split}, {run.network_name} of step {run.step}")
    print(format_table(result, run.info.class_names))
    path = pathlib.Path(args.workdir, f"eval_{args.split}_{args.checkpoint}.json")
    path.write_text(json.dumps(record(run, args.split, result), indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
