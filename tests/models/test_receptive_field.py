"""Receptive fields: the published number, and what gradients say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models import (
    ModelConfig,
    ReceptiveField,
    build_segmenter,
    receptive_field,
)
from tests.support.variables import random_variables


@pytest.mark.parametrize("variant", ["unimatch", "augseg"])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_layer1_of_the_deep_stem_has_the_published_field(backbone, variant):
    config = ModelConfig(backbone=backbone, variant=variant)
    assert receptive_field(config, "layer1") == ReceptiveField(39, 4, 19)


def test_strides_and_symmetry_of_every_tap():
    strides = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16, "decoder": 4}
    previous = 0
    for tap, stride in strides.items():
        field = receptive_field(ModelConfig(), tap)
        assert field.stride == stride
        assert field.size == 2 * field.padding + 1 > previous
        previous = field.size


def rows_seen(config: ModelConfig, tap: str, size: int, position: int) -> np.ndarray:
    """Rows of a tall image whose gradient of one row of a tap is not zero.

    The row's columns and channels are summed with random signs, so that a pixel which
    loses one maximum or meets one closed ReLU still shows through another.
    """
    module = build_segmenter(config)
    variables = random_variables(config)

    def response(images_bhwc):
        features = module.apply(variables, images_bhwc, until=tap, method=module.encode)
        row_bwd = features.taps[tap][:, position]
        return jnp.vdot(row_bwd, jax.random.normal(jax.random.key(2), row_bwd.shape))

    images_bhwc = jax.random.normal(jax.random.key(1), (2, size, 96, 3))
    gradient = jax.jit(jax.grad(response))(images_bhwc)
    return np.flatnonzero(np.any(gradient, axis=(0, 2, 3)))


@pytest.mark.parametrize(
    ("backbone", "tap"),
    [
        ("resnet50", "layer1"),
        ("resnet18", "layer1"),
        ("resnet50", "layer2"),
        ("resnet18", "layer2"),
        ("resnet18", "layer3"),
    ],
)
def test_gradients_reach_exactly_the_field(backbone, tap):
    config = ModelConfig(backbone=backbone, width=4, num_classes=2)
    field = receptive_field(config, tap)
    # The first position whose field lies inside the image.
    position = -(-field.padding // field.stride)
    first = position * field.stride - field.padding
    last = first + field.size - 1
    rows = rows_seen(config, tap, last + 20, position)
    assert (rows[0], rows[-1]) == (first, last)
    assert len(rows) == field.size
