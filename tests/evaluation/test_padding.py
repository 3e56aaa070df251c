"""How far padding to fewer sizes moves the mean IoU of a network that works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import build_segmenter, init_variables
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Network
from tests.support.toy_dataset import NUM_CLASSES, make_dataset

CONFIG = ModelConfig(backbone="resnet18", width=8, num_classes=NUM_CLASSES)
NAMES = [str(c) for c in range(NUM_CLASSES)]
BLOCK = 40
RIDGE = 1e-6


def _fit_classifier(module, variables):
    """Random features and a last layer that is fitted to them by least squares.

    The encoder, pooling and decoder leak padding as trained ones do, and no gradient
    has to be compiled.
    """
    crops = make_dataset([(97, 129)] * 8, seed=1, block=BLOCK)
    images = network_input(jnp.stack([jnp.asarray(e.image) for e in crops]), RGB)

    @jax.jit
    def decoder_map(variables, images):
        return Network(module, **variables).tap_map(images, "decoder")

    feature = decoder_map(variables, images)
    feature = np.asarray(feature, np.float64)
    # Align-corners: the map's points lie on every fourth pixel.
    label = np.stack([e.label[::4, ::4] for e in crops])
    known = label != 255
    x = np.concatenate([feature[known], np.ones((known.sum(), 1))], axis=1)
    gram = x.T @ x / len(x)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram, x.T @ np.eye(NUM_CLASSES)[label[known]] / len(x))
    classifier = variables["params"]["decoder"]["classifier"]
    fitted = {"kernel": weights[:-1], "bias": weights[-1]}
    assert classifier.keys() == fitted.keys()
    for name, value in fitted.items():
        classifier[name] = jnp.asarray(
            value.reshape(classifier[name].shape), classifier[name].dtype
        )


@pytest.mark.full
def test_padding_moves_mean_iou_little():
    module = build_segmenter(CONFIG)
    variables = init_variables(jax.random.key(0), CONFIG)
    _fit_classifier(module, variables)
    dataset = make_dataset([(92, 125), (93, 123)] * 8, seed=2, block=BLOCK)
    figures = {}
    for pad_to in (0, 32):
        evaluator = Evaluator(
            module,
            NUM_CLASSES,
            batch_size=8,
            pad_to=pad_to,
            devices=jax.local_devices()[:1],
        )
        result = evaluator.run(variables, dataset)
        figures[pad_to] = result.scalars(NAMES)["miou"]
        assert result.programs == (2 if pad_to == 0 else 1)
    assert figures[0] > 0.4, "the network does not work, the bound says nothing"
    assert figures[0] != figures[32], "padding had no effect at all"
    assert abs(figures[0] - figures[32]) < 0.02
