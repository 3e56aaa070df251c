"""Measures whether lambda_s is higher on right than on wrong pseudo-labels (eq. 5)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Canvas

from mpmc_jax.analysis.base import Drawing, Figure, SavedRun, by_name, drawing_of
from mpmc_jax.data.build import build_split
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.splits import read_ids
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.evaluation.predict import network_input, predict_classes
from mpmc_jax.evaluation.protocols import resize_nearest
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run, open_split
from mpmc_jax.types import IGNORE_LABEL, Array, PyTree


def lambda_s_function(run: Run) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Returns the function (images, labels) -> the run's classes and their lambda_s.

    Images are (b,h,w,c), the others (b,h,w). lambda_s weighs each prediction as
    training would weigh it as a pseudo-label (eq. 5), but without dividing by a batch's
    mean (`mpmc.lambda_scale=mean`).

    Raises:
      ValueError: the run has no patch classifier.
    """
    probe, plugin = run.probe, run.plugin
    if probe is None:
        raise ValueError("this run has no patch classifier (mpmc=off): no lambda_s")
    protocol = make_protocol(run.config)

    @bounded_jit()
    def weigh(
        variables: PyTree, head: PyTree, images: Array, labels: Array
    ) -> tuple[Array, Array]:
        normalized = network_input(images, run.facts.pixels)
        seen, targets = protocol.probed(normalized, labels)
        pseudo = predict_classes(run.module, variables, seen)
        logits, _, _ = probe.apply(head, seen, targets)
        weight = plugin.weigh_pixels(logits, pseudo)
        size = labels.shape[1:]
        return resize_nearest(pseudo, size=size), resize_nearest(weight, size=size)

    return functools.partial(weigh, run.variables, probe.variables)


def unlabeled_ids(run: Run, workdir: Path, info: DatasetInfo) -> frozenset[str]:
    """Returns the ids of the training images that the run used without labels.

    They are in the list that the run wrote to its directory. If that is missing, the
    lists that its settings name are read, which may have changed since.

    Raises:
      FileNotFoundError, ValueError: a list that is missing or does not fit the data
        set.
    """
    written = workdir / "splits" / "unlabeled.txt"
    if written.exists():
        return frozenset(read_ids(str(written), info.ids["train"]))
    return frozenset(build_split(run.config, info).unlabeled)


def measure(run: Run, workdir: Path) -> dict[str, Any]:
    """Measures lambda_s on right and on wrong pixels, relative to the overall mean.

    Raises:
      ValueError: the run has no patch classifier, or no unlabeled image has a label.
      FileNotFoundError, ValueError: see `unlabeled_ids`.
    """
    weigh = lambda_s_function(run)

    @bounded_jit()
    def sums(pseudo: Array, weight: Array, label: Array) -> Array:
        known = label != IGNORE_LABEL
        right, wrong = known & (pseudo == label), known & (pseudo != label)
        return jnp.stack(
            [right.sum(), (right * weight).sum(), wrong.sum(), (wrong * weight).sum()]
        )

    source = open_split(run, "train")
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


@dataclasses.dataclass(frozen=True)
class LambdaAccuracy(Figure):
    """Mean lambda_s on right and on wrong pseudo-labels, relative to the overall mean.

    The pseudo-labels are those of a run's unlabeled training images, whose labels
    training never reads.
    """

    checkpoint: ClassVar[str] = "last"

    def draw(self, runs: Sequence[SavedRun]) -> Drawing:
        """Draws two bars per run."""
        rows = [
            {"run": name, **measure(run.restored, run.workdir)}
            for name, run in by_name(runs).items()
        ]
        canvas = Canvas(figsize=(2 + 1.6 * len(rows), 3.6))
        axis = canvas.subplots()
        places = np.arange(len(rows))
        for kind, side in (("right", -0.2), ("wrong", 0.2)):
            heights = [row[f"lambda_{kind}"] for row in rows]
            axis.bar(places + side, heights, width=0.4, label=f"{kind} pseudo-labels")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_xticks(places, [row["run"] for row in rows])
        axis.set_ylabel("lambda_s / mean")
        axis.legend()
        canvas.tight_layout()
        return drawing_of(canvas, rows)
