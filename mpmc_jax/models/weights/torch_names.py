"""Converts published PyTorch weights to this project's variables and back.

Every variable has one key of the state dict, by the tables below. A missing or unused
key is an error, because silently skipped weights would leave a checkpoint half loaded.
Nothing here imports torch.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.encoders.resnet import BACKBONES
from mpmc_jax.models.registry import init_variables, title
from mpmc_jax.models.weights import vit_names
from mpmc_jax.models.weights.unet_names import torch_unit
from mpmc_jax.types import PyTree

# Names of the encoder and of the decoder's units as (convolution, batch norm).
ENCODER_PREFIX = {
    "unimatch": "backbone.",
    "augseg": "encoder.",
    "u2pl": "encoder.",
    "ael": "encoder.",
}
_PUBLISHED_CONTEXT = {
    "aspp_pool": ("decoder.aspp.conv1.1", "decoder.aspp.conv1.2"),
    "aspp0": ("decoder.aspp.conv2.0", "decoder.aspp.conv2.1"),
    "aspp1": ("decoder.aspp.conv3.0", "decoder.aspp.conv3.1"),
    "aspp2": ("decoder.aspp.conv4.0", "decoder.aspp.conv4.1"),
    "aspp3": ("decoder.aspp.conv5.0", "decoder.aspp.conv5.1"),
    "project": ("decoder.head.0", "decoder.head.1"),
    "low_level": ("decoder.low_conv.0", "decoder.low_conv.1"),
}
_AUXILIARY = {
    "auxiliary0": ("auxor.aux.0", "auxor.aux.1"),
    "auxiliary": ("auxor.aux.4", ""),
}
DECODER_UNITS = {
    "unimatch": {
        "aspp0": ("head.b0.0", "head.b0.1"),
        "aspp1": ("head.b1.0", "head.b1.1"),
        "aspp2": ("head.b2.0", "head.b2.1"),
        "aspp3": ("head.b3.0", "head.b3.1"),
        "aspp_pool": ("head.b4.gap.1", "head.b4.gap.2"),
        "project": ("head.project.0", "head.project.1"),
        "low_level": ("reduce.0", "reduce.1"),
        "fuse0": ("fuse.0", "fuse.1"),
        "fuse1": ("fuse.3", "fuse.4"),
        "classifier": ("classifier", ""),
    },
    "augseg": {
        **_PUBLISHED_CONTEXT,
        "fuse0": ("decoder.classifier.0", "decoder.classifier.1"),
        "fuse1": ("decoder.classifier.3", "decoder.classifier.4"),
        "classifier": ("decoder.classifier.6", ""),
    },
    "u2pl": {
        **_PUBLISHED_CONTEXT,
        "fuse0": ("decoder.classifier.0", "decoder.classifier.1"),
        "fuse1": ("decoder.classifier.4", "decoder.classifier.5"),
        "classifier": ("decoder.classifier.8", ""),
        "embed0": ("decoder.representation.0", "decoder.representation.1"),
        "embed1": ("decoder.representation.4", "decoder.representation.5"),
        "embedding": ("decoder.representation.8", ""),
        **_AUXILIARY,
    },
    "ael": {
        **_PUBLISHED_CONTEXT,
        "fuse0": ("decoder.tail.0", "decoder.tail.1"),
        "fuse1": ("decoder.tail.4", "decoder.tail.5"),
        "classifier": ("decoder.final", ""),
        **_AUXILIARY,
    },
}
DEEP_STEM = {
    "stem0": ("conv1.0", "conv1.1"),
    "stem1": ("conv1.3", "conv1.4"),
    "stem2": ("conv1.6", "bn1"),
}
PLAIN_STEM = {"stem0": ("conv1", "bn1")}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_BLOCK = re.compile(r"(layer\d)_(\d+)")

Path = tuple[str, ...]


def load_torch_state_dict(
    state_dict: Mapping[str, np.ndarray], config: ModelConfig
) -> dict[str, PyTree]:
    """Converts a segmenter's state dict to variables {"params", "batch_stats"}.

    Takes the names of the config's variant, with or without DistributedDataParallel's
    "module." prefix. float64 values stay float64 where JAX has it enabled.

    Raises:
      ValueError: keys are missing, unused or of another shape; lists them.
    """
    return _convert(state_dict, variable_shapes(config), torch_names(config), config)


def load_torch_backbone(
    state_dict: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[PyTree, PyTree]:
    """Converts a pretrained encoder's flat state dict to (params, batch_stats).

    Takes "conv1...", "layer1.0...": the keys of the published deep-stem checkpoints
    and, for ResNet-18, torchvision's. The classifier "fc.*" is skipped. Of a vision
    transformer it takes the layouts of `vit_names`, and the statistics are empty.

    Raises:
      ValueError: keys are missing, unused or of another shape; lists them.
    """
    encoder = {k: v for k, v in state_dict.items() if not k.startswith("fc.")}
    template = {
        p: leaf for p, leaf in variable_shapes(config).items() if p[1] == "backbone"
    }
    prefix = _published(config).encoder_prefix(config)
    names = {p: k.removeprefix(prefix) for p, k in torch_names(config).items()}
    variables = _convert(encoder, template, names, config)
    return (
        variables["params"]["backbone"],
        variables["batch_stats"].get("backbone", {}),
    )


def as_variables(leaves: Mapping[Path, Any]) -> dict[str, PyTree]:
    """Nests leaves by path to {"params", "batch_stats"}; the second may be empty."""
    return {"batch_stats": {}, **traverse_util.unflatten_dict(leaves)}


def torch_state_dict(
    variables: dict[str, PyTree], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Converts variables to the published network's state dict, without counters.

    The keys of an encoder alone are flat, like those of ImageNet weights.

    Raises:
      ValueError: the published network has no such part.
    """
    leaves = traverse_util.flatten_dict(variables)
    prefix = ""
    if all(path[1] == "backbone" for path in leaves):
        prefix = _published(config).encoder_prefix(config)
    found = {}
    for path, leaf in leaves.items():
        value = np.asarray(leaf)
        if value.ndim == 4:
            value = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        elif _is_matrix(path, value):
            value = np.ascontiguousarray(value.T)
        found[_torch_name(path, config).removeprefix(prefix)] = value
    return found


def torch_names(config: ModelConfig) -> dict[Path, str]:
    """Maps the path of every variable, collection first, to its state-dict key."""
    return {path: _torch_name(path, config) for path in variable_shapes(config)}


def variable_shapes(config: ModelConfig) -> Mapping[Path, Any]:
    """Maps the path of every variable to its shape."""
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda k: init_variables(k, config), key)
    return traverse_util.flatten_dict(variables)


def _torch_name(path: Path, config: ModelConfig) -> str:
    """Names a path such as ("params", "backbone", "stem0", "conv", "kernel")."""
    return _published(config).key(config, path[1:])


def _published(config: ModelConfig) -> "_Published":
    if config.name not in _NETWORKS:
        raise ValueError(
            f"no weights of {title(config)} were published; valid: {[*_NETWORKS]}"
        )
    return _NETWORKS[config.name]


class _Published(NamedTuple):
    """The names in the state dict of a published network.

    Attributes:
      key: (config, path without its collection) -> the key of the variable.
      encoder_prefix: the prefix that encoders published alone lack.
    """

    key: Callable[[ModelConfig, Path], str]
    encoder_prefix: Callable[[ModelConfig], str]


def _deeplabv3plus(config: ModelConfig, path: Path) -> str:
    half, unit, *inner, leaf = path
    return f"{_deeplabv3plus_unit(config, half, unit, inner)}.{LEAVES[leaf]}"


def _unet(config: ModelConfig, path: Path) -> str:
    _, unit, *inner, leaf = path
    return f"{torch_unit(unit, inner)}.{LEAVES[leaf]}"


def _transformer(
    prefix: str, decoder_key: Callable[..., str]
) -> Callable[[ModelConfig, Path], str]:
    """Makes `_Published.key` of a network on a vision transformer."""

    def key(config: ModelConfig, path: Path) -> str:
        half, *rest = path
        if half == "backbone":
            return prefix + vit_names.encoder_key(*rest)
        return decoder_key(*rest)

    return key


def _deeplabv3plus_unit(
    config: ModelConfig, half: str, unit: str, inner: list[str]
) -> str:
    if half == "backbone":
        return ENCODER_PREFIX[config.variant] + _encoder_name(unit, inner, config)
    units = DECODER_UNITS[config.variant]
    if unit not in units:
        raise ValueError(
            f"the published network of variant {config.variant!r} has no unit "
            f"{unit!r}: no weights of it can be loaded"
        )
    conv, norm = units[unit]
    return norm if inner == ["norm"] else conv


# One line per published network, by `ModelConfig.name`.
_NETWORKS = {
    "deeplabv3plus": _Published(_deeplabv3plus, lambda c: ENCODER_PREFIX[c.variant]),
    "unet": _Published(_unet, lambda c: ""),
    **dict.fromkeys(
        ("segmenter", "segmenter_linear"),
        _Published(
            _transformer("encoder.", vit_names.segmenter_key), lambda c: "encoder."
        ),
    ),
    "dpt": _Published(
        _transformer("backbone.", vit_names.dpt_key), lambda c: "backbone."
    ),
}


def _encoder_name(unit: str, inner: list[str], config: ModelConfig) -> str:
    is_norm = inner[-1] == "norm"
    block = _BLOCK.fullmatch(unit)
    if block is None:
        stem = DEEP_STEM if BACKBONES[config.backbone].deep_stem else PLAIN_STEM
        return stem[unit][is_norm]
    if inner[0] == "shortcut":
        name = f"downsample.{int(is_norm)}"
    else:
        name = inner[0].replace("conv", "bn") if is_norm else inner[0]
    return f"{block[1]}.{block[2]}.{name}"


def _convert(
    state_dict: Mapping[str, np.ndarray],
    template: Mapping[Path, jax.ShapeDtypeStruct],
    names: Mapping[Path, str],
    config: ModelConfig,
) -> dict[str, PyTree]:
    given = vit_names.unify(
        {
            key.removeprefix("module."): value
            for key, value in state_dict.items()
            if not key.endswith("num_batches_tracked")
        }
    )
    wanted = {names[path] for path in template}
    problems = [f"missing {name}" for name in sorted(wanted - set(given))]
    problems += [f"unused {name}" for name in sorted(set(given) - wanted)]
    variables = {}
    for path, leaf in template.items():
        if names[path] not in given:
            continue
        value = np.asarray(given[names[path]])
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif _is_matrix(path, value):
            value = value.T
        if value.shape != leaf.shape:
            problems.append(f"shape {names[path]}: {value.shape}, not {leaf.shape}")
        variables[path] = jnp.asarray(value)
    if problems:
        raise ValueError(
            f"the state dict is not one of {title(config)}, {config.num_classes} "
            f"classes: {_first(problems)}"
        )
    return as_variables(variables)


def _is_matrix(path: Path, value: np.ndarray) -> bool:
    """Whether this is a dense layer's kernel, whose axes PyTorch has in reverse."""
    return value.ndim == 2 and path[-1] == "kernel"


def _first(problems: list[str], number: int = 8) -> str:
    more = f"; and {len(problems) - number} more" if len(problems) > number else ""
    return "; ".join(problems[:number]) + more
