"""Pictures of a few validation images at each evaluation, for TensorBoard."""

from collections.abc import Callable

import jax
import ml_collections
from PIL import Image

from mpmc_jax.data.build import build_eval
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.evaluation import pictures
from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.experiments.build import Setup
from mpmc_jax.experiments.evaluation import (
    evaluated_network,
    make_probe_builder,
    make_protocol,
)
from mpmc_jax.experiments.patch_maps import lambda_function
from mpmc_jax.training.metric_writer import Picture
from mpmc_jax.training.state import TrainState, variables_of

# The largest side of one picture of a panel.
_SIDE = 512


def make_panels(
    config: ml_collections.ConfigDict, setup: Setup, facts: DatasetFacts
) -> Callable[[TrainState], dict[str, Picture]] | None:
    """Returns the function that draws a state's predictions; None for no panels.

    It draws `train.panels` validation images, evenly spread: image, truth, prediction
    and, with MPMC, lambda_s of the prediction (black is least, white most).
    """
    if not config.train.panels:
        return None
    dataset, protocol = build_eval(config, "val"), make_protocol(config)
    number = min(config.train.panels, len(dataset))
    chosen = [i * len(dataset) // number for i in range(number)]
    module = setup.step.modules[setup.step.method.networks[0]]
    probe = make_probe_builder(setup)
    weigh = lambda_function(setup.step.plugin, protocol, facts.pixels)
    predictor: Predictor | None = None

    def draw(state: TrainState) -> dict[str, Picture]:
        nonlocal predictor
        network = evaluated_network(config, setup, state)
        variables = variables_of(state, network.student, averaged=network.averaged)
        if predictor is None:
            # Without variables, which would stay on the device while training goes on.
            predictor = Predictor(module, {}, facts.pixels, protocol)
        predict = predictor.with_variables(variables)
        head = jax.device_put(probe(state))
        found = {}
        for index in chosen:
            example = dataset[index]
            classes = predict(example.image)
            row = {
                "image": pictures.displayable(example.image, facts.pixels),
                "truth": pictures.colorize(example.label, facts.palette),
                "prediction": pictures.colorize(classes, facts.palette),
            }
            if head is not None and not predict.uses_windows(classes.shape):
                weight = weigh(head, example.image[None], classes[None])[0]
                row["lambda_s"] = pictures.heat_map(weight)
            step = -(-max(classes.shape) // _SIDE)
            small = [each[::step, ::step] for each in row.values()]
            found[f"panels/{example.id}"] = _encode(pictures.panel([small], [*row]))
        return found

    return draw


def _encode(picture: Image.Image) -> Picture:
    columns, rows = picture.size
    return Picture(pictures.as_png(picture), rows, columns)
