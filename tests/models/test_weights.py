"""Weights between PyTorch, files and networks: detected, complete, fitted."""

import dataclasses

import chex
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mpmc_jax.models.weights import convert
from mpmc_jax.models.weights import files as weight_files
from mpmc_jax.models.weights.detect import detect
from mpmc_jax.models.weights.files import WeightsError
from mpmc_jax.models.weights.torch_names import torch_state_dict
from tests.support.published import NETWORKS, as_published, encoder_of, save, weights_of

LARGE = ("deep101", "plain101")


def params(*names):
    """Networks as parameters; the large ones wait for the full tests."""
    return [
        pytest.param(name, marks=[pytest.mark.full] * (name in LARGE)) for name in names
    ]


@pytest.mark.parametrize("name", params(*NETWORKS))
def test_a_network_is_found_from_its_keys_and_comes_back(name, tmp_path):
    config = NETWORKS[name]
    arrays, variables = as_published(config)
    given = {f"module.{key}": value for key, value in arrays.items()}
    found = convert.load(save(tmp_path / "given.safetensors", given))
    assert found.model == config and found.whole
    chex.assert_trees_all_equal(found.variables, variables)
    own = tmp_path / "own.safetensors"
    convert.save(own, found)
    again = convert.load(own)
    assert again.model == config and again.whole
    chex.assert_trees_all_equal(again.variables, variables)
    given_sum = weight_files.checksum(tmp_path / "given.safetensors")
    assert found.origin == {"file": "given.safetensors", "sha256": given_sum}
    assert again.origin["source_sha256"] == given_sum
    assert again.origin["sha256"] == weight_files.checksum(own) != given_sum
    back = torch_state_dict(again.variables, again.model)
    assert {k for k in arrays if "num_batches" not in k} == set(back)
    for key, value in back.items():
        np.testing.assert_array_equal(value, arrays[key])


@pytest.mark.parametrize("name", params("unimatch", "augseg", "ael", *LARGE))
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_an_encoder_alone_is_found_from_stem_and_depths(name, suffix, tmp_path):
    config = NETWORKS[name]
    arrays, variables = as_published(config)
    flat = encoder_of(arrays, config)
    flat |= {"fc.weight": np.zeros((1000, 2)), "fc.bias": np.zeros(1000)}
    path = tmp_path / f"encoder.{suffix}"
    _ = save(path, flat) if suffix == "safetensors" else np.savez(path, **flat)
    found = convert.load(path)
    assert not found.whole
    described = (found.model.backbone, found.model.width, found.model.in_channels)
    assert described == (config.backbone, config.width, config.in_channels)
    assert set(found.variables["params"]) == {"backbone"}
    for kind in ("params", "batch_stats"):
        chex.assert_trees_all_equal(
            found.variables[kind]["backbone"], variables[kind]["backbone"]
        )
    back = torch_state_dict(found.variables, found.model)
    for key, value in back.items():
        np.testing.assert_array_equal(value, flat[key])
    assert {key for key in flat if "num_batches" not in key} - set(back) == {
        "fc.weight",
        "fc.bias",
    }


def test_every_key_is_accounted_for(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    del arrays["backbone.layer2.1.bn1.bias"]
    arrays["head.b9.weight"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        convert.load(save(tmp_path / "w.safetensors", arrays))
    assert "w.safetensors" in str(caught.value)
    assert "missing backbone.layer2.1.bn1.bias" in str(caught.value)
    assert "unused head.b9.weight" in str(caught.value)


def test_a_wrong_file_names_the_first_missing_keys(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    kept = {k: v for k, v in arrays.items() if "layer1" in k or ".conv1.0" in k}
    kept["head.b0.0.weight"] = arrays["head.b0.0.weight"]
    kept["classifier.weight"] = arrays["classifier.weight"]
    for layer in (2, 3, 4):
        kept |= {
            k: v for k, v in arrays.items() if f"layer{layer}" in k and "conv" in k
        }
    with pytest.raises(WeightsError, match="missing backbone.*; and [0-9]+ more") as e:
        convert.load(save(tmp_path / "w.safetensors", kept))
    assert len(str(e.value)) < 1000
    strange = {"blocks.0.attn.qkv.weight": np.zeros((3, 3), np.float32)}
    with pytest.raises(WeightsError, match="first keys are blocks.0.attn.qkv.weight"):
        convert.load(save(tmp_path / "vit.safetensors", strange))


def test_depths_and_stems_that_we_do_not_have_are_named(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    flat = encoder_of(arrays, config)
    short = {key: value for key, value in flat.items() if "layer3.5" not in key}
    with pytest.raises(ValueError, match=r"deep stem and \(3, 4, 5, 3\) bottleneck"):
        detect({key: value.shape for key, value in short.items()})


@pytest.mark.parametrize(
    ("changes", "whole", "message"),
    [
        ({"backbone": "resnet101"}, False, "--config.model.backbone=resnet50"),
        ({"backbone": "resnet50_plain"}, False, "backbone='resnet50'"),
        ({"backbone": "resnet50_plain"}, True, "backbone='resnet50'"),
        ({"width": 8}, False, "width=4"),
        ({"variant": "augseg"}, True, "variant='unimatch'.*--part=encoder"),
        ({"num_classes": 7}, True, "num_classes=3, this run has 7;.*--part=encoder"),
        ({"name": "unet"}, False, "name='deeplabv3plus'"),
    ],
)
def test_weights_of_another_network_are_refused(changes, whole, message):
    config = NETWORKS["unimatch"]
    other = dataclasses.replace(config, **changes)
    with pytest.raises(WeightsError, match=message):
        convert.fit(weights_of(config, whole), other)


def test_heads_that_only_one_side_has_are_told():
    full = NETWORKS["u2pl"]
    plain = dataclasses.replace(full, embedding=False, auxiliary=False)
    start = convert.fit(weights_of(full), plain)
    assert start.unused == (
        "auxiliary",
        "auxiliary0",
        "embed0",
        "embed1",
        "embedding",
    )
    assert start.fresh == ()
    start = convert.fit(weights_of(plain), full)
    assert "embedding" in start.fresh and start.unused == ()
    assert "embedding" not in start.variables["params"]["decoder"]
    # Of an encoder all heads are fresh, which nobody need be told.
    start = convert.fit(weights_of(plain, whole=False), full)
    assert start.fresh == start.unused == () and not start.adapted


@hypothesis.given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 9))
def test_channels_that_repeat_give_what_the_given_ones_gave(given, wanted, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((3, 3, given, 5)).astype(np.float32)
    adapted = convert.adapt_channels(kernel, wanted)
    assert adapted.shape == (3, 3, wanted, 5) and adapted.dtype == np.float32
    if wanted == 1:
        gray = rng.standard_normal((3, 3, 1)).astype(np.float32)
        same = np.einsum("hwi,hwio->o", gray.repeat(given, -1), kernel)
        np.testing.assert_allclose(
            np.einsum("hwi,hwio->o", gray, adapted), same, rtol=1e-4, atol=1e-5
        )
    elif wanted % given == 0:
        patch = rng.standard_normal((3, 3, given)).astype(np.float32)
        again = np.concatenate([patch] * (wanted // given), -1)
        np.testing.assert_allclose(
            np.einsum("hwi,hwio->o", again, adapted),
            np.einsum("hwi,hwio->o", patch, kernel),
            rtol=1e-4,
            atol=1e-5,
        )
    if wanted == given > 1:
        np.testing.assert_array_equal(adapted, kernel)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_first_convolution_is_adapted_and_nothing_else(channels):
    config = NETWORKS["unimatch"]
    found = weights_of(config)
    start = convert.fit(found, dataclasses.replace(config, in_channels=channels))
    assert start.adapted == (channels != 3)
    kernel = start.variables["params"]["backbone"]["stem0"]["conv"].pop("kernel")
    given = found.variables["params"]["backbone"]["stem0"]["conv"].pop("kernel")
    np.testing.assert_array_equal(kernel, convert.adapt_channels(given, channels))
    chex.assert_trees_all_equal(start.variables, found.variables)
