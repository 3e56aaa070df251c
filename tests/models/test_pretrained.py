"""Conversion of PyTorch state dicts: full coverage, both layouts, clear errors."""

import chex
import jax
import numpy as np
import pytest

from mpmc_jax.models import (
    ModelConfig,
    build_segmenter,
    load_torch_backbone,
    load_torch_state_dict,
)
from mpmc_jax.models.weights.torch_names import torch_names
from tests.support.variables import random_variables

CONFIGS = {
    "unimatch": ModelConfig(width=4, num_classes=3),
    "augseg": ModelConfig(width=4, num_classes=3, variant="augseg"),
    "basic": ModelConfig(width=4, num_classes=3, backbone="resnet18"),
}


def torch_state_dict(config, variables, prefix=""):
    """Variables as PyTorch would have saved them."""
    state_dict = {}
    for path, name in torch_names(config).items():
        leaf = variables
        for part in path:
            leaf = leaf[part]
        value = np.asarray(leaf)
        is_kernel = value.ndim == 4
        state_dict[prefix + name] = value.transpose(3, 2, 0, 1) if is_kernel else value
        if name.endswith("running_mean"):
            counter = name.replace("running_mean", "num_batches_tracked")
            state_dict[prefix + counter] = np.zeros((), np.int64)
    return state_dict


@pytest.fixture(params=CONFIGS, scope="module")
def case(request):
    config = CONFIGS[request.param]
    return config, random_variables(config)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_returns_every_variable(case, prefix):
    config, variables = case
    state_dict = torch_state_dict(config, variables, prefix)
    chex.assert_trees_all_equal(load_torch_state_dict(state_dict, config), variables)


def test_names_are_unique(case):
    config, variables = case
    names = list(torch_names(config).values())
    assert len(set(names)) == len(names) == len(jax.tree.leaves(variables))


def test_missing_unused_and_misshapen_keys_are_all_listed(case):
    config, variables = case
    state_dict = torch_state_dict(config, variables)
    first, second, *_ = (name for name in state_dict if name.endswith("running_var"))
    del state_dict[first]
    state_dict[second] = np.zeros(1)
    state_dict["extra.weight"] = np.zeros(1)
    with pytest.raises(ValueError, match="3 classes") as caught:
        load_torch_state_dict(state_dict, config)
    for problem in (f"missing {first}", f"shape {second}", "unused extra.weight"):
        assert problem in str(caught.value)


def test_backbone_alone_loads_from_the_flat_names(case):
    config, variables = case
    prefix = "encoder." if config.variant == "augseg" else "backbone."
    flat = {
        name.removeprefix(prefix): value
        for name, value in torch_state_dict(config, variables).items()
        if name.startswith(prefix)
    }
    assert "layer1.0.conv1.weight" in flat
    flat["fc.weight"], flat["fc.bias"] = np.zeros((1000, 2)), np.zeros(1000)
    params, stats = load_torch_backbone(flat, config)
    chex.assert_trees_all_equal(params, variables["params"]["backbone"])
    chex.assert_trees_all_equal(stats, variables["batch_stats"]["backbone"])
    del flat["layer4.0.downsample.0.weight"]
    with pytest.raises(ValueError, match=r"missing layer4\.0\.downsample\.0\.weight"):
        load_torch_backbone(flat, config)


def test_converted_weights_give_the_same_prediction():
    config = CONFIGS["basic"]
    variables = random_variables(config)
    loaded = load_torch_state_dict(torch_state_dict(config, variables), config)
    images = jax.random.normal(jax.random.key(0), (1, 33, 33, 3))
    module = build_segmenter(config)
    apply = jax.jit(module.apply)
    np.testing.assert_array_equal(
        apply(loaded, images).logits, apply(variables, images).logits
    )
