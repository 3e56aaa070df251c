"""A run's pseudo-labels with their confidence and lambda_s, as training has them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mpmc_jax.data.build import build_split
from mpmc_jax.data.dataset import DatasetInfo
from mpmc_jax.data.splits import read_ids
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import resize_nearest
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run
from mpmc_jax.methods.pseudo_labels import confidence_and_label
from mpmc_jax.types import Array, PyTree

# The logit of a patch classifier that is certain; its sigmoid is 1 in float32.
CERTAIN = 30.0


class PseudoLabels(NamedTuple):
    """Pseudo-labels of images, (b,h,w) each.

    Attributes:
      label: the classes.
      confidence: the probability of the class.
      weight: lambda_s of the class.
      oracle: lambda_s if the patch classifier were always right.
    """

    label: Array | np.ndarray
    confidence: Array | np.ndarray
    weight: Array | np.ndarray
    oracle: Array | np.ndarray


def pseudo_label_function(run: Run) -> Callable[[Array, Array], PseudoLabels]:
    """Returns the function (images, labels) -> the run's pseudo-labels.

    Images are (b,h,w,c), labels (b,h,w). lambda_s weighs each prediction as training
    would weigh it as a pseudo-label (eq. 5), but without dividing by a batch's mean
    (`mpmc.lambda_scale=mean`). The run has a patch classifier, see
    `SavedRun.classifying`.
    """
    probe, plugin = run.probe, run.plugin
    protocol = make_protocol(run.config)

    @bounded_jit()
    def predict(
        variables: PyTree, head: PyTree, images: Array, labels: Array
    ) -> PseudoLabels:
        normalized = network_input(images, run.facts.pixels)
        seen, targets = protocol.probed(normalized, labels)
        scores = run.module.apply(variables, seen).logits
        confidence, pseudo = confidence_and_label(scores)
        logits, present, _ = probe.apply(head, seen, targets)
        certain = jnp.where(present, CERTAIN, -CERTAIN).astype(logits.dtype)
        maps = PseudoLabels(
            pseudo,
            confidence,
            plugin.weigh_pixels(logits, pseudo),
            plugin.weigh_pixels(certain, pseudo),
        )
        size = labels.shape[1:]
        return PseudoLabels(*(resize_nearest(each, size=size) for each in maps))

    return functools.partial(predict, run.variables, probe.variables)


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
