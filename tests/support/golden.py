"""The golden recipe: a published network's weights follow from the names of its keys.

Files lie in $MPMC_GOLDEN: for each network a JSON of its keys and shapes, and arrays
that the published implementation computed with the recipe's weights. Nothing is read
from the name of a file but its kind.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from mpmc_jax.models import ModelConfig
from mpmc_jax.models.weights.torch_names import torch_names, torch_state_dict
from tests.support.variables import random_variables

# A key of each published DeepLabV3+, by which its state dict is known.
_MARKS = {
    "head.b0.0.weight": "unimatch",
    "decoder.classifier.6.weight": "augseg",
    "decoder.classifier.8.weight": "u2pl",
    "decoder.final.weight": "ael",
}


def golden_dir() -> Path:
    """The folder of golden files; skips the test where there is none."""
    if "MPMC_GOLDEN" not in os.environ:
        pytest.skip("MPMC_GOLDEN does not name the folder of golden files")
    return Path(os.environ["MPMC_GOLDEN"])


def golden_files(pattern: str) -> list[Path]:
    """All golden files of a kind; skips the test where there is none."""
    files = sorted(golden_dir().glob(pattern))
    if not files:
        pytest.skip(f"no {pattern} in MPMC_GOLDEN")
    return files


def collected(pattern: str) -> list:
    """All golden files of a kind as parameters of a test, which is skipped without."""
    folder = os.environ.get("MPMC_GOLDEN")
    files = sorted(Path(folder).glob(pattern)) if folder else []
    if not files:
        reason = f"no {pattern} in MPMC_GOLDEN" if folder else "MPMC_GOLDEN is not set"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.stem) for path in files]


def model_of(json_path: Path) -> ModelConfig:
    """The network of a JSON file, from its `arch` and the keys of its state dict."""
    described = json.loads(json_path.read_text())
    shapes, num_classes = described["state_dict"], described["num_classes"]
    if described["arch"] == "unet":
        first = shapes["encoder.in_conv.conv_conv.0.weight"]
        return ModelConfig(name="unet", num_classes=num_classes, in_channels=first[1])
    (variant,) = {name for key, name in _MARKS.items() if key in shapes}
    return ModelConfig(
        backbone=described["arch"],
        num_classes=num_classes,
        variant=variant,
        embedding=any(key.startswith("decoder.representation.") for key in shapes),
        auxiliary=any(key.startswith("auxor.") for key in shapes),
    )


def recipe_state_dict(json_path: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    """The recipe's weights of a JSON file's keys."""
    return recipe(json.loads(json_path.read_text())["state_dict"], dtype)


def recipe_of(model: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """The recipe's weights of a network that no JSON file describes."""
    arrays = torch_state_dict(random_variables(model), model)
    return recipe({key: value.shape for key, value in arrays.items()}, dtype)


def recipe(shapes: Mapping[str, tuple[int, ...]], dtype) -> dict[str, np.ndarray]:
    """The recipe's weights, rounded to float32 and then cast to `dtype`."""
    return {
        key: _recipe(key, tuple(shape)).astype(dtype) for key, shape in shapes.items()
    }


def _recipe(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) >= 2:
        value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("bn3.weight"):
        value = rng.uniform(0.1, 0.5, shape)
    elif key.endswith("weight"):
        value = rng.uniform(0.3, 1.5, shape)
    else:
        value = rng.standard_normal(shape) * 0.1
    return value.astype(np.float32)


def by_torch_name(config: ModelConfig, variables) -> dict[str, np.ndarray]:
    """The variables of a network by the names of the published state dict."""
    leaves = traverse_util.flatten_dict(variables)
    return {name: leaves[path] for path, name in torch_names(config).items()}


def spatial_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest |a-b| over the deviation of b about its channel means; both (n,c,h,w)."""
    centered = b - b.mean(axis=(0, 2, 3), keepdims=True)
    return float(np.abs(a - b).max() / centered.std())
