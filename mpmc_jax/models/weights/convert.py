"""Loads, saves and adapts weights: a network's description and its variables."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import (
    adapters,
    first_kernel,
    identifying_fields,
    same_encoder,
)
from mpmc_jax.models.weights import files as weight_files
from mpmc_jax.models.weights.detect import detect
from mpmc_jax.models.weights.files import WeightsError
from mpmc_jax.models.weights.torch_names import (
    as_variables,
    load_torch_backbone,
    load_torch_state_dict,
    variable_shapes,
)
from mpmc_jax.models.weights.vit_names import unify
from mpmc_jax.types import PyTree

# Distinguishes this project's own files from those with PyTorch's keys.
_FORMAT = "mpmc_jax"
_VERSION = "1"
# The settings that describe a network, without those of how it computes.
_DESCRIBED = (
    "name",
    "backbone",
    "variant",
    "num_classes",
    "in_channels",
    "embedding",
    "auxiliary",
    "width",
    "image_size",
)
# Settings that older files lack.
_LATER = {"image_size"}

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network, or its encoder alone.

    Attributes:
      model: the network; for an encoder alone the decoder's fields mean nothing.
      whole: whether the decoder is included.
      variables: {"params", "batch_stats"}, as NumPy.
      origin: names and checksums of the files they come from, for manifests.
      run: what `experiments.exported` writes of a run, so that the weights predict
        without it; {} if they are of no run.
    """

    model: ModelConfig
    whole: bool
    variables: PyTree
    origin: dict[str, str]
    run: dict[str, Any] = dataclasses.field(default_factory=dict)

    def encoder(self) -> "Weights":
        """Returns the same weights without the decoder."""
        variables = {
            kind: {"backbone": tree["backbone"]} if tree else {}
            for kind, tree in self.variables.items()
        }
        return dataclasses.replace(self, whole=False, variables=variables, run={})


@dataclasses.dataclass(frozen=True)
class Start:
    """The part of weights from which a run starts.

    Attributes:
      variables: {"params", "batch_stats"}, all or some of the network's.
      fresh: heads of the network that the weights do not have.
      unused: heads of the weights that the network does not have.
      adapted: whether the first convolution was adapted to other channels.
    """

    variables: PyTree
    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    adapted: bool


def load(path: pathlib.Path, state: str = "") -> Weights:
    """Reads weights: our own files, or PyTorch's keys in any format of `weight_files`.

    Raises:
      WeightsError: the file cannot be used, or a key is missing or unused.
      FileNotFoundError: there is no such file.
    """
    file = weight_files.read(path, state)
    origin = {"file": path.name, "sha256": file.sha256}
    if file.state:
        origin["state"] = file.state
    try:
        if file.metadata.get("format") == _FORMAT:
            found = _own(file, origin)
        else:
            found = _published(file.arrays, origin)
        _check_variances(found.variables)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    return found


def save(path: pathlib.Path, weights: Weights) -> None:
    """Writes weights as this project's own .safetensors.

    Raises:
      WeightsError: the path has another suffix.
    """
    arrays = {
        "/".join(parts): np.asarray(leaf)
        for parts, leaf in traverse_util.flatten_dict(weights.variables).items()
    }
    described = {name: getattr(weights.model, name) for name in _DESCRIBED}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "whole": json.dumps(weights.whole),
        "model": json.dumps(described),
        "origin": json.dumps(weights.origin),
        **({"run": json.dumps(weights.run)} if weights.run else {}),
    }
    weight_files.write(path, arrays, metadata)


def fit(weights: Weights, model: ModelConfig) -> Start:
    """Selects the variables from which a network of `model` can start.

    Raises:
      WeightsError: they are of another network; the message says which setting fits.
    """
    _check_same(weights, model)
    found: dict[Path, Any] = dict(traverse_util.flatten_dict(weights.variables))
    first = first_kernel(model)
    kernel = found[first]
    adapted = kernel.shape[2] != model.in_channels
    if adapted:
        found[first] = adapt_channels(kernel, model.in_channels)
    wanted = variable_shapes(model)
    units = {path[:3] for path in wanted if path[1] == "decoder"}
    given = {path[:3] for path in found if path[1] == "decoder"}
    fresh = sorted({unit for _, _, unit in units - given}) if weights.whole else []
    kept = {path: value for path, value in found.items() if path in wanted}
    for path, adapt in adapters(model).items():
        if path in kept and kept[path].shape != wanted[path].shape:
            kept[path] = adapt(kept[path], wanted[path].shape)
    if any(value.shape != wanted[path].shape for path, value in kept.items()):
        raise WeightsError(
            f"{weights.origin['file']} is of a network for images of "
            f"{weights.model.image_size} pixels, this run has {model.image_size}; set "
            f"--config.data.crop={weights.model.image_size}"
        )
    return Start(
        variables=as_variables(kept),
        fresh=tuple(fresh),
        unused=tuple(sorted({unit for _, _, unit in given - units})),
        adapted=adapted,
    )


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapts a first convolution (h,w,i,o) to other channels: (h,w,channels,o).

    For one channel the kernels are summed, as for a gray image in all channels. For
    more, the given channels repeat in turn, scaled by i / channels.
    """
    given = kernel.shape[2]
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    turns = kernel[:, :, np.arange(channels) % given]
    return turns * kernel.dtype.type(given / channels)


_ENCODER_ALONE = "`python -m launch.convert_weights --part=encoder` takes its encoder"


def _check_same(weights: Weights, model: ModelConfig) -> None:
    if weights.whole:
        names = [*identifying_fields(model), "width", "num_classes"]
    elif same_encoder(weights.model, model):
        names = ["width"]
    else:
        names = (
            ["backbone", "name"]
            if "backbone" in identifying_fields(model)
            else ["name"]
        )
    for name in names:
        given, wanted = getattr(weights.model, name), getattr(model, name)
        if given == wanted:
            continue
        fix = f"set --config.model.{name}={given}"
        if name == "variant":
            fix += f", or {_ENCODER_ALONE}"
        if name == "num_classes":
            fix = _ENCODER_ALONE
        raise WeightsError(
            f"{weights.origin['file']} is of a network with {name}={given!r}, this run "
            f"has {wanted!r}; {fix}"
        )


def _check_variances(variables: PyTree) -> None:
    """Raises WeightsError for a running variance below 0, whose root is NaN."""
    for path, leaf in traverse_util.flatten_dict(variables["batch_stats"]).items():
        least = np.asarray(leaf).min()
        if path[-1] == "var" and least < 0:
            raise WeightsError(
                f"batch norm's variance {'/'.join(path[:-1])} is {least}, and none is "
                "negative; the file is damaged"
            )


def _published(arrays: dict[str, np.ndarray], origin: dict[str, str]) -> Weights:
    """Converts arrays with PyTorch's keys."""
    arrays = unify({key.removeprefix("module."): v for key, v in arrays.items()})
    model, whole = detect({key: value.shape for key, value in arrays.items()})
    if whole:
        variables = load_torch_state_dict(arrays, model)
    else:
        params, stats = load_torch_backbone(arrays, model)
        variables = {
            "params": {"backbone": params},
            "batch_stats": {"backbone": stats} if stats else {},
        }
    return Weights(model, whole, jax.tree.map(np.asarray, variables), origin)


def _own(file: weight_files.WeightFile, origin: dict[str, str]) -> Weights:
    """Reads the weights of a file that `save` wrote."""
    if file.metadata.get("version") != _VERSION:
        raise WeightsError(
            f"format version {file.metadata.get('version')!r}, not {_VERSION!r}; "
            "convert the original again"
        )
    described = weight_files.parse(file.metadata, "model")
    if set(described) | _LATER != set(_DESCRIBED):
        raise WeightsError(f"the metadata's model has {sorted(described)}")
    example = ModelConfig()
    for name, value in described.items():
        if type(value) is not type(getattr(example, name)):
            raise WeightsError(f"the metadata's model has {name}={value!r}")
    model = ModelConfig(**described)
    whole = {"true": True, "false": False}.get(file.metadata.get("whole", ""))
    if whole is None:
        raise WeightsError("the metadata's 'whole' is neither true nor false")
    wanted = {
        "/".join(path): leaf.shape
        for path, leaf in variable_shapes(model).items()
        if whole or path[1] == "backbone"
    }
    given = {key: value.shape for key, value in file.arrays.items()}
    wrong = sorted(
        key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key)
    )
    if wrong:
        raise WeightsError(
            f"{len(wrong)} arrays are missing, not of the network or of another shape, "
            f"such as {', '.join(wrong[:5])}"
        )
    flat = {tuple(key.split("/")): value for key, value in file.arrays.items()}
    source = weight_files.parse(file.metadata, "origin")
    origin = {**origin, **{f"source_{key}": str(v) for key, v in source.items()}}
    run = weight_files.parse(file.metadata, "run") if "run" in file.metadata else {}
    return Weights(model, whole, as_variables(flat), origin, run)
