"""Published networks with random weights, as PyTorch saves them."""

import numpy as np
from safetensors import numpy as safetensors_numpy

from mpmc_jax.models import ModelConfig
from mpmc_jax.models.weights import convert
from mpmc_jax.models.weights.torch_names import ENCODER_PREFIX, torch_state_dict
from tests.support.variables import random_variables

NETWORKS = {
    "unimatch": ModelConfig(width=4, num_classes=3, backbone="resnet50"),
    "augseg": ModelConfig(width=8, variant="augseg", backbone="resnet50_plain"),
    "u2pl": ModelConfig(
        width=4, num_classes=5, variant="u2pl", embedding=True, auxiliary=True
    ),
    "ael": ModelConfig(width=4, variant="ael", auxiliary=True, backbone="resnet18"),
    "deep101": ModelConfig(width=4, backbone="resnet101", in_channels=4),
    "plain101": ModelConfig(width=4, backbone="resnet101_plain"),
    "unet": ModelConfig(name="unet", width=8, num_classes=4, in_channels=1),
}


def as_published(config, counters=True):
    """Random weights of a network as PyTorch saves them, and the variables."""
    variables = random_variables(config)
    arrays = torch_state_dict(variables, config)
    if counters:
        arrays |= {
            key.replace("running_mean", "num_batches_tracked"): np.array(7)
            for key in arrays
            if key.endswith("running_mean")
        }
    return arrays, variables


def encoder_of(arrays, config):
    prefix = ENCODER_PREFIX[config.variant]
    return {
        key.removeprefix(prefix): value
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


def save(path, arrays, metadata=None):
    safetensors_numpy.save_file(arrays, path, metadata=metadata)
    return path


def weights_of(config, whole=True, path="w.safetensors"):
    found = convert.Weights(config, True, random_variables(config), {"file": path})
    return found if whole else found.encoder()
