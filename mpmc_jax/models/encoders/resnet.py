"""Residual networks with an output stride of 16 or 8 (He et al. 2016, dilated).

A network begins as data: `resnet_spec` lists its convolutions, the module runs that
list, and `receptive_field` reads the same list. Channels, dilations and pooling are
those of the methods' published encoders: a stem of three 3x3 convolutions for ResNet-50
and -101; layer4 (at stride 8 layer3 too) keeps the resolution and dilates instead.
ResNet-18 and the `_plain` networks have the 7x7 stem of torchvision's ImageNet weights
and, unlike torchvision, the same dilated layer4.
"""

import dataclasses
import functools

import jax
from flax import linen as nn
from jax.nn import initializers

from mpmc_jax.models import layers, pooling
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.interface import Encoder, Tap, feature_maps
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.rematerialization import rematerialized

Array = jax.Array

LAYERS = ("layer1", "layer2", "layer3", "layer4")
STRIDES = {16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
MAX_POOL = ConvSpec(features=0, kernel=3, stride=2)

# By `ModelConfig.remat`: how many blocks are recomputed together. Between them, their
# output is kept, which is a third of what a block keeps.
_TOGETHER = {"off": 1, "cheap": 4, "all": 1}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Depths, kind of blocks and stem of one backbone."""

    depths: tuple[int, int, int, int]
    bottleneck: bool
    deep_stem: bool


BACKBONES = {
    "resnet18": Backbone((2, 2, 2, 2), bottleneck=False, deep_stem=False),
    "resnet50": Backbone((3, 4, 6, 3), bottleneck=True, deep_stem=True),
    "resnet101": Backbone((3, 4, 23, 3), bottleneck=True, deep_stem=True),
    "resnet50_plain": Backbone((3, 4, 6, 3), bottleneck=True, deep_stem=False),
    "resnet101_plain": Backbone((3, 4, 23, 3), bottleneck=True, deep_stem=False),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the encoders of the published networks differ.

    Attributes:
      output_stride: stride of layer4, 16 or 8.
      layer4_dilations: dilations of the 3x3 convolutions of layer4's blocks
        ("multi-grid").
      ceil_pool: the max-pool rounds its output size up.
      zero_init_residual: each residual block starts as the identity.
    """

    output_stride: int
    layer4_dilations: tuple[int, int, int]
    ceil_pool: bool
    zero_init_residual: bool


_U2PL = Variant(8, (4, 8, 16), ceil_pool=True, zero_init_residual=True)
VARIANTS = {
    "unimatch": Variant(16, (1, 2, 2), ceil_pool=False, zero_init_residual=False),
    "augseg": Variant(16, (2, 4, 8), ceil_pool=True, zero_init_residual=True),
    "u2pl": _U2PL,
    "ael": _U2PL,
}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The convolutions of a residual block, and that of its shortcut if it has one."""

    convs: tuple[ConvSpec, ...]
    shortcut: ConvSpec | None


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """The description of a whole encoder as data.

    Attributes:
      stem: the convolutions before the max-pool (3x3, stride 2, padding 1).
      ceil_pool: the max-pool rounds its output size up (AugSeg) or down.
      blocks: the blocks of layer1 to layer4.
      zero_init_residual: each block's last batch norm starts at scale 0.
    """

    stem: tuple[ConvSpec, ...]
    ceil_pool: bool
    blocks: tuple[tuple[BlockSpec, ...], ...]
    zero_init_residual: bool = False

    def channels(self, layer: str) -> int:
        """Returns the channels of a layer's output."""
        return self.blocks[LAYERS.index(layer)][-1].convs[-1].features

    def paths(self, in_channels: int) -> list[tuple[int, int, ConvSpec]]:
        """Lists (input channels, input stride, convolution)."""
        found, channels, stride = [], in_channels, 1
        for conv in self.stem:
            found.append((channels, stride, conv))
            channels, stride = conv.features, stride * conv.stride
        stride *= MAX_POOL.stride
        for block in (block for blocks in self.blocks for block in blocks):
            if block.shortcut is not None:
                found.append((channels, stride, block.shortcut))
            for conv in block.convs:
                found.append((channels, stride, conv))
                channels, stride = conv.features, stride * conv.stride
        return found

    def layers_to(self, layer: str) -> list[ConvSpec]:
        """Lists the layers from the image to a layer's output, without shortcuts."""
        chain = [*self.stem, MAX_POOL]
        for blocks in self.blocks[: LAYERS.index(layer) + 1]:
            chain += [conv for block in blocks for conv in block.convs]
        return chain


def build(config: ModelConfig, axis_name: str | None) -> Encoder:
    """Builds the residual network `config.backbone` of the config's variant."""
    variant = VARIANTS[config.variant]
    spec = resnet_spec(
        BACKBONES[config.backbone],
        width=config.width,
        output_stride=variant.output_stride,
        layer4_dilations=variant.layer4_dilations,
        ceil_pool=variant.ceil_pool,
        zero_init_residual=variant.zero_init_residual,
    )
    return Encoder(
        ResNet(spec, axis_name, config.remat),
        taps={
            layer: Tap(spec.channels(layer), tuple(spec.layers_to(layer)))
            for layer in LAYERS
        },
        default_tap="layer1",
        first_kernel=("stem0", "conv", "kernel"),
        maps=feature_maps(spec.paths(config.in_channels)),
        has_variants=True,
    )


def resnet_spec(
    backbone: Backbone,
    *,
    width: int,
    output_stride: int,
    layer4_dilations: tuple[int, ...],
    ceil_pool: bool,
    zero_init_residual: bool,
) -> ResNetSpec:
    """Lists the convolutions of a backbone.

    Args:
      backbone: a value of `BACKBONES`.
      width: channels of layer1's inner convolutions; 64 as published.
      output_stride: stride of layer4, 16 or 8. At 8 all blocks of layer3 except the
        first dilate by 2.
      layer4_dilations: dilation of the 3x3 convolutions of layer4's blocks.
      ceil_pool: see `ResNetSpec`.
      zero_init_residual: see `ResNetSpec`.
    """
    if backbone.deep_stem:
        stem = (ConvSpec(width, 3, 2), ConvSpec(width, 3), ConvSpec(2 * width, 3))
    else:
        stem = (ConvSpec(width, 7, 2),)
    channels, all_blocks = stem[-1].features, []
    for index, depth in enumerate(backbone.depths):
        dilations = (1,) * depth
        if LAYERS[index] == "layer4":
            dilations = layer4_dilations
        elif LAYERS[index] == "layer3" and output_stride == 8:
            dilations = (1, *(2,) * (depth - 1))
        blocks = []
        for i in range(depth):
            stride = STRIDES[output_stride][index] if i == 0 else 1
            block = _block_spec(
                backbone.bottleneck, channels, width << index, stride, dilations[i]
            )
            channels = block.convs[-1].features
            blocks.append(block)
        all_blocks.append(tuple(blocks))
    return ResNetSpec(stem, ceil_pool, tuple(all_blocks), zero_init_residual)


def _block_spec(
    bottleneck: bool, channels: int, inner: int, stride: int, dilation: int
) -> BlockSpec:
    if bottleneck:
        convs = (
            ConvSpec(inner),
            ConvSpec(inner, 3, stride, dilation),
            ConvSpec(4 * inner),
        )
    else:
        convs = (
            ConvSpec(inner, 3, stride, dilation),
            ConvSpec(inner, 3, 1, dilation),
        )
    out = convs[-1].features
    changes = stride > 1 or channels != out
    return BlockSpec(convs, ConvSpec(out, 1, stride) if changes else None)


class ResidualBlock(nn.Module):
    """A basic or bottleneck block: relu(convolutions(x) + shortcut(x))."""

    spec: BlockSpec
    axis_name: str | None = None
    zero_init: bool = False

    @nn.compact
    def __call__(self, x_bhwd: Array, train: bool) -> Array:
        """Maps (b,h,w,d) to (b,h',w',d'); `train` is static for `nn.jit`."""

        def conv_norm(spec: ConvSpec, slope: float | None, scale_init, name: str):
            return layers.ConvNorm(
                spec,
                self.axis_name,
                slope=slope,
                kernel_init=layers.kaiming_normal_fan_out,
                scale_init=scale_init,
                name=name,
            )

        ones = initializers.ones
        *convs, last = self.spec.convs
        out_bhwd, shortcut_bhwd = x_bhwd, x_bhwd
        for i, spec in enumerate(convs, start=1):
            out_bhwd = conv_norm(spec, 0.0, ones, f"conv{i}")(out_bhwd, train=train)
        if self.spec.shortcut is not None:
            module = conv_norm(self.spec.shortcut, None, ones, "shortcut")
            shortcut_bhwd = module(x_bhwd, train=train)
        scale_init = initializers.zeros if self.zero_init else ones
        module = conv_norm(last, 0.0, scale_init, f"conv{len(self.spec.convs)}")
        return module(out_bhwd, shortcut_bhwd, train=train)


class ResNet(nn.Module):
    """The encoder: maps images to the outputs of layer1, layer2, ... up to `until`.

    Attributes:
      spec: the convolutions, from `resnet_spec`.
      axis_name: devices over which batch norm is synchronized.
      remat: what blocks recompute in the backward pass, see `ModelConfig.remat`.
    """

    spec: ResNetSpec
    axis_name: str | None = None
    remat: str = "off"

    @nn.compact
    def __call__(
        self, images_bhwc: Array, *, until: str | None, train: bool
    ) -> dict[str, Array]:
        """Runs the layers in order; None for `until` runs all of them."""
        # Equal blocks are traced once, except when variables are made, because their
        # keys differ. Argument 2 is `train`, counted with self.
        block_cls = ResidualBlock
        if not self.is_initializing():
            block_cls = nn.jit(block_cls, static_argnums=(2,))

        def stem(module: nn.Module, x_bhwd: Array) -> Array:
            for i, conv in enumerate(self.spec.stem):
                x_bhwd = layers.ConvNorm(
                    conv,
                    self.axis_name,
                    kernel_init=layers.kaiming_normal_fan_out,
                    name=f"stem{i}",
                    parent=module,
                )(x_bhwd, train=train)
            return x_bhwd

        def run(
            module: nn.Module, x_bhwd: Array, blocks: dict[str, BlockSpec]
        ) -> Array:
            for name, block in blocks.items():
                x_bhwd = block_cls(
                    block,
                    self.axis_name,
                    self.spec.zero_init_residual,
                    name=name,
                    parent=module,
                )(x_bhwd, train)
            return x_bhwd

        x_bhwd = rematerialized(stem, self.remat)(self, images_bhwc)
        x_bhwd = max_pool(x_bhwd, ceil=self.spec.ceil_pool)
        taps = {}
        for layer, blocks in zip(LAYERS, self.spec.blocks, strict=True):
            named = [(f"{layer}_{i}", block) for i, block in enumerate(blocks)]
            together = _TOGETHER[self.remat]
            for begin in range(0, len(named), together):
                group = dict(named[begin : begin + together])
                part = functools.partial(run, blocks=group)
                x_bhwd = rematerialized(part, self.remat)(self, x_bhwd)
            taps[layer] = x_bhwd
            if layer == until:
                break
        return taps


def max_pool(x_bhwd: Array, *, ceil: bool) -> Array:
    """Applies a 3x3 max-pool of stride 2, padding 1; rounds its size up or down."""
    spec, pads = MAX_POOL, []
    for size in x_bhwd.shape[1:3]:
        remainder = (size + 2 * spec.padding - spec.kernel) % spec.stride
        # When rounding up, one more window starts on the last row and reaches over it.
        extra = spec.stride - remainder if ceil and remainder else 0
        pads.append((spec.padding, spec.padding + extra))
    return pooling.max_pool(x_bhwd, spec.kernel, spec.stride, tuple(pads))
