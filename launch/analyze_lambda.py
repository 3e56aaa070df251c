"""Measures whether lambda_s is higher on right pseudo-labels than on wrong ones.

python -m launch.analyze_lambda --workdir=runs/camvid --checkpoint=last

Predicts the run's unlabeled training images and compares the predictions with their
labels, which training never reads. Writes WORKDIR/trust_<checkpoint>.json.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from launch import cli
from mpmc_jax.atomic_write import to_json, write_json
from mpmc_jax.data.build import build_split
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.splits import read_ids
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.experiments import run as runs
from mpmc_jax.paths import as_path
from mpmc_jax.text import printable
from mpmc_jax.types import IGNORE_LABEL, Array


def unlabeled_ids(run: runs.Run, workdir: Path, info: DatasetInfo) -> frozenset[str]:
    """The ids of the training images that the run used without labels.

    They are in the list that the run wrote to its directory. The lists that its
    settings name may have moved or changed since, and are read only without that one.

    Raises:
      FileNotFoundError, ValueError: a list that is missing or does not fit the data
        set.
    """
    written = workdir / "splits" / "unlabeled.txt"
    if written.exists():
        return frozenset(read_ids(str(written), info.ids["train"]))
    return frozenset(build_split(run.config, info).unlabeled)


def measure(run: runs.Run, workdir: Path) -> dict[str, Any]:
    """Means of lambda_s over right and over wrong pixels, relative to the overall mean.

    Raises:
      ValueError: the run has no patch classifier, or no unlabeled image has a label.
      FileNotFoundError, ValueError: see `unlabeled_ids`.
    """
    weigh = runs.lambda_s_function(run)

    @bounded_jit()
    def sums(pseudo: Array, weight: Array, label: Array) -> Array:
        known = label != IGNORE_LABEL
        right, wrong = known & (pseudo == label), known & (pseudo != label)
        return jnp.stack(
            [right.sum(), (right * weight).sum(), wrong.sum(), (wrong * weight).sum()]
        )

    source = runs.open_split(run, "train")
    unlabeled = unlabeled_ids(run, workdir, source.info)
    chosen = [i for i, name in enumerate(source.ids) if name in unlabeled]
    if not chosen:
        raise ValueError("none of the unlabeled images has a label to compare with")
    total = np.zeros(4)
    for number in chosen:
        example = source[number]
        label = jnp.asarray(example.label[None])
        one = sums(*weigh(jnp.asarray(example.image[None]), label), label)
        total += np.asarray(one, np.float64)
    mean = (total[1] + total[3]) / (total[0] + total[2])
    return {
        "images": len(chosen),
        "right_pixels": int(total[0]),
        "wrong_pixels": int(total[2]),
        "lambda_right": total[1] / max(total[0], 1) / mean,
        "lambda_wrong": total[3] / max(total[2], 1) / mean,
    }


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
        found = measure(run, workdir)
        path = workdir / f"trust_{args.checkpoint}.json"
        write_json(path, {"step": run.step, **found, "manifest": run.manifest})
        print(to_json(found, indent=2))
        mark = ", on a partial data set" if run.facts.partial else ""
        print(printable(f"written to {path}{mark}"))


if __name__ == "__main__":
    main()
