"""The networks against the numbers of their published implementations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models import build_segmenter, load_torch_state_dict
from mpmc_jax.types import Network
from tests.support import golden
from tests.support.x64 import run_x64

# Train-mode passes; the JSON file of the same name describes the network.
TRAINED = "*_train.npz"


def load(json_path: Path, dtype=np.float32):
    """(config, module, variables) of a golden network."""
    config = golden.model_of(json_path)
    weights = golden.recipe_state_dict(json_path, dtype)
    return config, build_segmenter(config), load_torch_state_dict(weights, config)


def channels_last(images: np.ndarray, dtype=np.float32) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1), dtype)


@functools.partial(jax.jit, static_argnames="module")
def small_and_full(module, variables, image):
    network = Network(module, **variables)
    features, network = network.encode(image)
    small, _ = network.decode(features)
    return small, module.apply(variables, image)


def evaluation_maps(module, variables, image) -> dict[str, np.ndarray]:
    """Every map that a golden file may hold, by its name there, channels first."""
    with jax.default_matmul_precision("highest"):
        small, full = small_and_full(module, variables, channels_last(image))
    assert full.logits.dtype == jnp.float32
    maps = {"logits": full.logits, "logits_stride4": small.logits}
    if full.embedding is not None:
        maps["representation"] = full.embedding[..., ::8]
    if full.auxiliary is not None:
        maps["aux_logits"] = full.auxiliary[:, ::2, ::2]
    return {name: np.asarray(x).transpose(0, 3, 1, 2) for name, x in maps.items()}


@pytest.mark.parametrize("json_path", golden.collected("*.json"))
def test_evaluation_maps_equal_the_published_ones(json_path):
    _, module, variables = load(json_path)
    arrays = np.load(json_path.with_suffix(".npz"))
    images = [name for name in arrays.files if name.startswith("image_")]
    assert images
    compared = set()
    for name in images:
        for what, found in evaluation_maps(module, variables, arrays[name]).items():
            key = name.replace("image", what)
            if key in arrays.files:
                error = golden.spatial_error(found, arrays[key])
                assert error < 1e-4, key
                compared.add(key)
    assert compared | set(images) == set(arrays.files)


def train_errors(dtype=np.float32) -> dict[str, float]:
    """Worst error, by kind of quantity, of a train-mode pass over all golden files."""
    worst = {"logits": 0.0, "loss": 0.0, "gradients": 0.0, "statistics": 0.0}

    def note(kind: str, error: float) -> None:
        worst[kind] = float(np.maximum(worst[kind], error))

    for path in golden.golden_files(TRAINED):
        json_path = path.with_name(path.name.replace("_train.npz", ".json"))
        arrays = np.load(path)
        config, module, variables = load(json_path, dtype)
        with jax.default_matmul_precision("highest"):
            found = _train_pass(module, variables, arrays, dtype)
        logits, loss, stats, gradients = jax.device_get(found)
        logits = logits.transpose(0, 3, 1, 2)[:, :, ::4, ::4]
        note("logits", golden.spatial_error(logits, arrays["logits"]))
        note("loss", abs(loss / arrays["loss"] - 1))
        leaves = golden.by_torch_name(
            config, {"params": gradients, "batch_stats": stats}
        )
        names = arrays["grad_norm_names"]
        for name, expected in zip(names, arrays["grad_norms"], strict=True):
            note("gradients", abs(np.linalg.norm(leaves[name]) / expected - 1))
        for i, name in enumerate(arrays["stat_names"]):
            expected = arrays[f"stat_{i}"]
            difference = np.abs(leaves[name] - expected).max()
            note("statistics", difference / np.abs(expected).max())
    return worst


def _train_pass(module, variables, arrays, dtype):
    images = channels_last(arrays["image"], dtype)
    labels = jnp.asarray(arrays["labels"])

    @jax.jit
    def run(params):
        def mean_cross_entropy(params):
            prediction, moved = module.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            valid = labels != 255
            target = jax.nn.one_hot(
                jnp.where(valid, labels, 0), module.num_classes, dtype=dtype
            )
            log_prob = jax.nn.log_softmax(prediction.logits)
            loss = -jnp.sum(target * log_prob * valid[..., None]) / jnp.sum(valid)
            return loss, (prediction.logits, moved["batch_stats"])

        (loss, (logits, stats)), gradients = jax.value_and_grad(
            mean_cross_entropy, has_aux=True
        )(params)
        return logits, loss, stats, gradients

    return run(variables["params"])


@pytest.mark.full
def test_training_pass_equals_the_published_one_in_float32():
    worst = train_errors()
    assert worst["loss"] < 1e-5
    assert worst["statistics"] < 1e-4
    assert worst["gradients"] < 2e-2


@pytest.mark.full
def test_training_pass_equals_the_published_one_in_float64():
    golden.golden_files(TRAINED)  # skips here, not in the other process
    worst = run_x64(
        "import json, numpy\nfrom tests.models import test_golden\n"
        "print(json.dumps(test_golden.train_errors(numpy.float64)))"
    )
    assert np.max(list(worst.values())) < 1e-8, worst
