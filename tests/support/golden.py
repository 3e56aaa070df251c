"""The golden recipe: a published network's weights follow from the names of its keys.

Files lie in $MPMC_GOLDEN: for each network a JSON of its keys and shapes, and arrays
that the published implementation computed with the recipe's weights.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest


def golden_dir() -> Path:
    """The folder of golden files; skips the test where there is none."""
    if "MPMC_GOLDEN" not in os.environ:
        pytest.skip("MPMC_GOLDEN does not name the folder of golden files")
    return Path(os.environ["MPMC_GOLDEN"])


def golden_files(pattern: str) -> list[Path]:
    """All golden files of a kind; none at all is a failure."""
    files = sorted(golden_dir().glob(pattern))
    assert files, f"no {pattern} in MPMC_GOLDEN"
    return files


def recipe_state_dict(json_path: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    """The recipe's weights, rounded to float32 and then cast to `dtype`."""
    shapes = json.loads(json_path.read_text())["state_dict"]
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


def spatial_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest |a-b| over the deviation of b about its channel means; both (n,c,h,w)."""
    centered = b - b.mean(axis=(0, 2, 3), keepdims=True)
    return float(np.abs(a - b).max() / centered.std())
