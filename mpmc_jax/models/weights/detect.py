"""Detects the network of a PyTorch state dict from its keys and shapes."""

import dataclasses
import re
from collections.abc import Mapping

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.encoders import vit
from mpmc_jax.models.encoders.resnet import BACKBONES, Backbone
from mpmc_jax.models.weights.torch_names import DECODER_UNITS, ENCODER_PREFIX

Shapes = Mapping[str, tuple[int, ...]]

# A key of each variant's decoder; the first one found decides.
_MARKS = {
    "unimatch": "head.b0.0.weight",
    "augseg": "decoder.classifier.6.weight",
    "u2pl": "decoder.classifier.8.weight",
    "ael": "decoder.final.weight",
}
_UNET_FIRST = "encoder.in_conv.conv_conv.0.weight"
_UNET_LAST = "decoder.out_conv.weight"


def detect(shapes: Shapes) -> tuple[ModelConfig, bool]:
    """Detects the network of a state dict, and whether it is whole or an encoder alone.

    Takes keys with and without DistributedDataParallel's "module.".

    Raises:
      ValueError: the network is unknown; the message says what is.
    """
    shapes = {key.removeprefix("module."): shape for key, shape in shapes.items()}
    for prefix, find in _ON_TRANSFORMERS.items():
        if f"{prefix}pos_embed" in shapes:
            return find(shapes, _transformer(shapes, prefix)), bool(prefix)
    for find in (_unet, _deeplabv3plus):
        if (config := find(shapes)) is not None:
            return config, True
    return _encoder(shapes, ""), False


def _transformer(shapes: Shapes, prefix: str) -> ModelConfig:
    """Detects a vision transformer, whose heads have 64 channels each."""
    embed = f"{prefix}patch_embed.proj.weight"
    if len(shapes.get(embed, ())) != 4:
        raise ValueError(f"these are no weights that we know: {embed} is missing")
    features, channels, patch, _ = shapes[embed]
    block = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
    numbers = {found[1] for key in shapes if (found := block.match(key))}
    scaled = f"{prefix}blocks.0.ls1.gamma" in shapes
    side = vit.grid_side(shapes[f"{prefix}pos_embed"][1])
    for name, spec in vit.BACKBONES.items():
        family = spec.family
        sizes = (spec.heads * 64, spec.depth, family.patch, family.layer_scale)
        if sizes == (features, len(numbers), patch, scaled):
            return ModelConfig(
                # Any decoder that takes it, for an encoder alone.
                name="segmenter",
                backbone=name,
                in_channels=channels,
                image_size=side * patch,
            )
    raise ValueError(
        f"these weights are of a vision transformer with {features} channels, "
        f"{len(numbers)} blocks, patches of {patch} pixels and "
        f"{'' if scaled else 'no '}LayerScale; ours are {', '.join(vit.BACKBONES)}"
    )


def _dpt(shapes: Shapes, encoder: ModelConfig) -> ModelConfig:
    last = _shape(shapes, "head.scratch.output_conv.2.weight")
    return dataclasses.replace(encoder, name="dpt", num_classes=last[0])


def _segmenter(shapes: Shapes, encoder: ModelConfig) -> ModelConfig:
    if (masks := shapes.get("decoder.mask_norm.weight")) is not None:
        return dataclasses.replace(encoder, name="segmenter", num_classes=masks[0])
    last = _shape(shapes, "decoder.head.weight")
    return dataclasses.replace(encoder, name="segmenter_linear", num_classes=last[0])


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ValueError(f"these are no weights that we know: {key} is missing")
    return shapes[key]


# Prefix of the encoder's keys in a published network, "" for an encoder alone -> how
# its decoder is detected.
_ON_TRANSFORMERS = {
    "": lambda shapes, encoder: encoder,
    "backbone.": _dpt,
    "encoder.": _segmenter,
}


def _unet(shapes: Shapes) -> ModelConfig | None:
    if _UNET_FIRST not in shapes or _UNET_LAST not in shapes:
        return None
    channels, last = shapes[_UNET_FIRST], shapes[_UNET_LAST]
    return ModelConfig(
        name="unet",
        width=4 * channels[0],
        in_channels=channels[1],
        num_classes=last[0],
    )


def _deeplabv3plus(shapes: Shapes) -> ModelConfig | None:
    variant = next((name for name, key in _MARKS.items() if key in shapes), None)
    if variant is None:
        return None
    prefix = ENCODER_PREFIX[variant]
    encoder = _encoder(shapes, prefix)
    units = DECODER_UNITS[variant]

    def has(unit: str) -> bool:
        return unit in units and f"{units[unit][0]}.weight" in shapes

    return ModelConfig(
        backbone=encoder.backbone,
        variant=variant,
        num_classes=shapes[f"{units['classifier'][0]}.weight"][0],
        in_channels=encoder.in_channels,
        embedding=has("embedding"),
        auxiliary=has("auxiliary"),
        width=encoder.width,
    )


def _encoder(shapes: Shapes, prefix: str) -> ModelConfig:
    """Detects an encoder's stem, depths, kind of block, width and channels."""
    shapes = {
        key.removeprefix(prefix): shape
        for key, shape in shapes.items()
        if key.startswith(prefix)
    }
    deep = "conv1.0.weight" in shapes
    first = shapes.get("conv1.0.weight", shapes.get("conv1.weight"))
    inner = shapes.get("layer1.0.conv1.weight")
    if first is None or inner is None or len(first) != 4:
        some = ", ".join(list(shapes)[:3])
        raise ValueError(
            f"these are not the weights of a network that we know: {prefix}conv1.* or "
            f"{prefix}layer1.0.conv1.weight is missing; the first keys are {some}"
        )
    numbers = [
        {int(key.split(".")[1]) for key in shapes if re.match(rf"{layer}\.\d+\.", key)}
        for layer in ("layer1", "layer2", "layer3", "layer4")
    ]
    depths = tuple(len(found) for found in numbers)
    found = Backbone(depths, "layer1.0.conv3.weight" in shapes, deep)  # pyright: ignore
    for name, backbone in BACKBONES.items():
        if backbone == found:
            return ModelConfig(backbone=name, in_channels=first[1], width=inner[0])
    blocks = "bottleneck" if found.bottleneck else "basic"
    stem = "deep" if deep else "plain"
    raise ValueError(
        f"these weights are of a ResNet with a {stem} stem and {depths} {blocks} "
        f"blocks; ours are {', '.join(BACKBONES)}"
    )
