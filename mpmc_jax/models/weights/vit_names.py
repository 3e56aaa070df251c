"""Maps vision transformers and their decoders to the keys of published files.

Meta's and timm's keys are the common form. `unify` brings the two other layouts of an
encoder to it: transformers', and augreg's original .npz, whose arrays have Flax's axes.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_ENCODER_UNITS = {"class_token": "cls_token", "position": "pos_embed"}
_BLOCK_UNITS = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale1": "ls1.gamma",
    "scale2": "ls2.gamma",
}
_MASK_UNITS = {
    "class_embeddings": "cls_emb",
    "project": "proj_dec",
    "patch_projection": "proj_patch",
    "class_projection": "proj_classes",
    "norm": "decoder_norm",
    "mask_norm": "mask_norm",
}
_FUSION_UNITS = {"skip": "resConfUnit1", "unit": "resConfUnit2", "out": "out_conv"}
# Units of the DPT head, by the first letters of ours; the rest is a number.
_DPT_UNITS = {
    "project": lambda number: f"projects.{number - 1}",
    "resize": lambda number: f"resize_layers.{number - 1}",
    "layer": lambda number: f"scratch.layer{number}_rn",
    "fusion": lambda number: f"scratch.refinenet{number}",
}
_DPT_ENDS = {"output": "scratch.output_conv.0", "classifier": "scratch.output_conv.2"}

# What published networks contain and never use: DINOv2's mask token, the classifier of
# the pretraining, and the unit of the deepest fusion that has nothing to add.
_UNUSED = re.compile(
    r"(backbone\.|encoder\.)?(mask_token|(head|pre_logits(\.fc)?)[./](weight|bias"
    r"|kernel))|head\.scratch\.refinenet4\.resConfUnit1\..*"
)

# One line per layout's key: pattern, key in the common form ("#" and a number for a
# part of the joint projection), and the axes of the array.
_Rule = tuple[str, str, Callable[[np.ndarray], np.ndarray]]


def _same(value: np.ndarray) -> np.ndarray:
    return value


def _flat(value: np.ndarray) -> np.ndarray:
    return value.reshape(-1)


def _first_out(value: np.ndarray) -> np.ndarray:
    """(in, out...) -> (out, in)."""
    return value.reshape(len(value), -1).T


def _last_out(value: np.ndarray) -> np.ndarray:
    """(in..., out) -> (out, in)."""
    return value.reshape(-1, value.shape[-1]).T


def _image_kernel(value: np.ndarray) -> np.ndarray:
    return value.transpose(3, 2, 0, 1)


_TRANSFORMERS: tuple[_Rule, ...] = (
    (r"embeddings\.cls_token", "cls_token", _same),
    (r"embeddings\.mask_token", "mask_token", _same),
    (r"embeddings\.position_embeddings", "pos_embed", _same),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1", _same),
    (r"layernorm\.(\w+)", r"norm.\1", _same),
    (r"encoder\.layer\.(\d+)\.norm([12])\.(\w+)", r"blocks.\1.norm\2.\3", _same),
    (r"encoder\.layer\.(\d+)\.mlp\.(\w+)\.(\w+)", r"blocks.\1.mlp.\2.\3", _same),
    (
        r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1",
        r"blocks.\1.ls\2.gamma",
        _same,
    ),
    (
        r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)",
        r"blocks.\1.attn.proj.\2",
        _same,
    ),
    *(
        (
            rf"encoder\.layer\.(\d+)\.attention\.attention\.{name}\.(\w+)",
            rf"blocks.\1.attn.qkv.\2#{number}",
            _same,
        )
        for number, name in enumerate(("query", "key", "value"))
    ),
)
_BLOCK = r"Transformer/encoderblock_(\d+)"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_AUGREG: tuple[_Rule, ...] = (
    (r"cls", "cls_token", _same),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed", _same),
    (r"embedding/kernel", "patch_embed.proj.weight", _image_kernel),
    (r"embedding/bias", "patch_embed.proj.bias", _same),
    (r"Transformer/encoder_norm/scale", "norm.weight", _same),
    (r"Transformer/encoder_norm/bias", "norm.bias", _same),
    *(
        (f"{_BLOCK}/LayerNorm_{ours}/{leaf}", rf"blocks.\1.norm{theirs}.{name}", _same)
        for ours, theirs in ((0, 1), (2, 2))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    ),
    *(
        (
            f"{_BLOCK}/MlpBlock_3/Dense_{i}/{leaf}",
            rf"blocks.\1.mlp.fc{i + 1}.{name}",
            to,
        )
        for i in range(2)
        for leaf, name, to in (("kernel", "weight", _last_out), ("bias", "bias", _same))
    ),
    (f"{_ATTENTION}/out/kernel", r"blocks.\1.attn.proj.weight", _last_out),
    (f"{_ATTENTION}/out/bias", r"blocks.\1.attn.proj.bias", _same),
    *(
        (f"{_ATTENTION}/{part}/{leaf}", rf"blocks.\1.attn.qkv.{name}#{number}", to)
        for number, part in enumerate(("query", "key", "value"))
        for leaf, name, to in (
            ("kernel", "weight", _first_out),
            ("bias", "bias", _flat),
        )
    ),
)
# A key that tells the layout -> its rules.
_LAYOUTS = {
    "embeddings.patch_embeddings.projection.weight": _TRANSFORMERS,
    "Transformer/posembed_input/pos_embedding": _AUGREG,
}
PREFIXES = ("", "backbone.", "encoder.")


def unify(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Brings a vision transformer's arrays to the common keys, without unused ones.

    Arrays of other networks, and keys that belong to no layout, stay as they are.

    Raises:
      ValueError: a part of a joint projection is missing.
    """
    found = {key.removeprefix("opt/target/"): value for key, value in arrays.items()}
    rules = next((rules for mark, rules in _LAYOUTS.items() if mark in found), None)
    if rules is not None:
        found = _joined(dict(_renamed(rules, *item) for item in found.items()))
    if not any(f"{prefix}pos_embed" in found for prefix in PREFIXES):
        return dict(arrays)
    return {k: value for k, value in found.items() if not _UNUSED.fullmatch(k)}


def _renamed(
    rules: tuple[_Rule, ...], key: str, value: np.ndarray
) -> tuple[str, np.ndarray]:
    for pattern, name, transform in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(name), transform(value)
    return key, value


def _joined(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates the parts "KEY#0", "KEY#1" and "KEY#2" to KEY."""
    found = {key: value for key, value in arrays.items() if "#" not in key}
    for whole in dict.fromkeys(key.split("#")[0] for key in arrays if "#" in key):
        parts = [arrays.get(f"{whole}#{number}") for number in range(3)]
        given = [part for part in parts if part is not None]
        if len(given) < len(parts):
            raise ValueError(f"{whole} has not all of query, key and value")
        found[whole] = np.concatenate(given)
    return found


def encoder_key(*path: str) -> str:
    """Returns the key, without a prefix, of an encoder's variable at a path."""
    unit, *rest = path
    if unit.startswith("block"):
        return f"blocks.{unit.removeprefix('block')}.{_block_key(*rest)}"
    if not rest:
        return _ENCODER_UNITS[unit]
    return f"{'patch_embed.proj' if unit == 'embed' else unit}.{_LEAVES[rest[0]]}"


def _block_key(unit: str, leaf: str = "") -> str:
    return f"{_BLOCK_UNITS[unit]}.{_LEAVES[leaf]}" if leaf else _BLOCK_UNITS[unit]


def segmenter_key(*path: str) -> str:
    """Returns the key of a variable of Segmenter's decoders."""
    unit, *rest = path
    if unit == "masks" and rest[0].startswith("block"):
        number = rest[0].removeprefix("block")
        return f"decoder.blocks.{number}.{_block_key(*rest[1:])}"
    if unit == "masks":
        leaf = f".{_LEAVES[rest[1]]}" if len(rest) > 1 else ""
        return f"decoder.{_MASK_UNITS[rest[0]]}{leaf}"
    _check_published(unit, ("masks", "classifier"))
    return f"decoder.head.{_LEAVES[rest[0]]}"


def dpt_key(*path: str) -> str:
    """Returns the key of a variable of UniMatch V2's DPT head."""
    unit, *inner, leaf = path
    kind, number = unit.rstrip("1234"), unit.lstrip("abcdefghijklmnopqrstuvwxyz")
    _check_published(kind, (*_DPT_UNITS, *_DPT_ENDS))
    name = _DPT_UNITS[kind](int(number)) if number else _DPT_ENDS[unit]
    within = [_FUSION_UNITS.get(each, each) for each in inner]
    return ".".join(["head", name, *within, _LEAVES[leaf]])


def _check_published(unit: str, published: tuple[str, ...]) -> None:
    if unit not in published:
        raise ValueError(
            f"the published network has no unit {unit!r}: no weights of it can be "
            "loaded"
        )
