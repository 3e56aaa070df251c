"""Draws image, truth, prediction and lambda_s of a run's validation images."""

import jax.numpy as jnp
import numpy as np

from mpmc_jax.analysis.lambda_accuracy import lambda_s_function
from mpmc_jax.evaluation.pictures import colorize, displayable, heat_map
from mpmc_jax.experiments.run import Run, open_split

CAPTIONS = ("image", "truth", "prediction", "lambda_s of the prediction")


def panel_rows(run: Run, count: int) -> list[list[np.ndarray]]:
    """Makes the pictures of the first `count` validation images of one size.

    Raises:
      ValueError: the run has no patch classifier.
    """
    weigh = lambda_s_function(run)
    source = open_split(run, "val")
    chosen = [i for i in range(len(source)) if source.size(i) == source.size(0)]
    pictures = []
    for number in chosen[:count]:
        example = source[number]
        pseudo, weight = weigh(
            jnp.asarray(example.image[None]), jnp.asarray(example.label[None])
        )
        pictures.append(
            [
                displayable(example.image, run.facts.pixels),
                colorize(example.label, run.facts.palette),
                colorize(np.asarray(pseudo[0]), run.facts.palette),
                heat_map(np.asarray(weight[0])),
            ]
        )
    return pictures
