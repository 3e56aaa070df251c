"""The decoder of DeepLabV3+ (Chen et al. 2018) and the methods' variants of it.

The published networks differ in details that change every number: `VARIANTS` holds
these differences, and nothing else depends on the variant.
"""

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.interface import Decoder, Encoder, Tap, feature_maps
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Interpolation, Layer, stride_of
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Prediction

Array = jax.Array

# Encoder outputs that the decoder reads, and the input of the auxiliary classifier.
DECODER_INPUTS = ("layer1", "layer4")
AUXILIARY_INPUT = "layer3"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the decoders of the published networks differ.

    Attributes:
      aspp_rates: dilations of the context's 3x3 convolutions.
      pool_first: the image-pooling branch leads the ASPP concatenation.
      project_kernel: side of the convolution that joins the branches.
      low_level: channels of the convolution on layer1, at width 64.
      low_level_bias: the convolution on layer1 has a bias (batch norm follows).
      fuse_bias: the convolutions after the concatenation have a bias.
    """

    aspp_rates: tuple[int, int, int]
    pool_first: bool
    project_kernel: int
    low_level: int
    low_level_bias: bool
    fuse_bias: bool


_UNIMATCH = Variant(
    aspp_rates=(6, 12, 18),
    pool_first=False,
    project_kernel=1,
    low_level=48,
    low_level_bias=False,
    fuse_bias=False,
)
_AUGSEG = dataclasses.replace(
    _UNIMATCH,
    pool_first=True,
    low_level_bias=True,
)
_U2PL = dataclasses.replace(
    _AUGSEG,
    aspp_rates=(12, 24, 36),
    project_kernel=3,
    low_level=256,
    fuse_bias=True,
)
VARIANTS = {"unimatch": _UNIMATCH, "augseg": _AUGSEG, "u2pl": _U2PL, "ael": _U2PL}


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The decoder's convolutions; published channel counts in brackets."""

    aspp: tuple[ConvSpec, ...]  # 256 each: 1x1, then one 3x3 per rate
    pool: ConvSpec  # 256, after global average pooling
    project: ConvSpec  # 256
    low_level: ConvSpec  # 48, or 256
    fuse: tuple[ConvSpec, ...]  # 256 each, 3x3; the embedding head has its own

    @property
    def channels(self) -> int:
        """Channels of the last map before the classifier."""
        return self.fuse[-1].features

    def dropout_channels(self, *, embedding: bool, auxiliary: bool) -> dict[str, int]:
        """Returns the maps whose channels U2PL and AEL drop, with their channels."""
        names = ["project", "fuse0", "fuse1"]
        names += ["embed0", "embed1"] if embedding else []
        names += ["auxiliary0"] if auxiliary else []
        return dict.fromkeys(names, self.channels)


def build(config: ModelConfig, encoder: Encoder, axis_name: str | None) -> Decoder:
    """Builds the config's decoder for any encoder with the layers that it reads."""
    variant = VARIANTS[config.variant]
    spec = _decoder_spec(variant, config.width)
    return Decoder(
        ASPPDecoder(
            spec,
            variant,
            config.num_classes,
            config.embedding,
            config.auxiliary,
            axis_name,
        ),
        inputs=DECODER_INPUTS,
        tap=Tap(spec.channels, _layers(encoder, spec)),
        size_tap=DECODER_INPUTS[0],
        maps=feature_maps(_paths(encoder, spec)),
        dropout_channels=spec.dropout_channels(
            embedding=config.embedding, auxiliary=config.auxiliary
        ),
        has_variants=True,
    )


def _decoder_spec(variant: Variant, width: int) -> DecoderSpec:
    """Describes the decoder for an encoder of that width (64 as published)."""
    features = 4 * width
    return DecoderSpec(
        aspp=(
            ConvSpec(features),
            *(ConvSpec(features, 3, dilation=rate) for rate in variant.aspp_rates),
        ),
        pool=ConvSpec(features),
        project=ConvSpec(features, variant.project_kernel),
        low_level=ConvSpec(variant.low_level * width // 64),
        fuse=(ConvSpec(features, 3), ConvSpec(features, 3)),
    )


def _paths(
    encoder: Encoder, spec: DecoderSpec
) -> list[tuple[int, int | Fraction, ConvSpec]]:
    """Lists (input channels, input stride, convolution), without the heads."""
    (low, near), (high, far) = (
        (tap.channels, stride_of(tap.layers))
        for tap in map(encoder.tap, DECODER_INPUTS)
    )
    branches = [conv.features for conv in (*spec.aspp, spec.pool)]
    first, second = spec.fuse
    joined = spec.project.features + spec.low_level.features
    return [
        *((high, far, conv) for conv in spec.aspp),
        (sum(branches), far, spec.project),
        (low, near, spec.low_level),
        (joined, near, first),
        (first.features, near, second),
    ]


def _layers(encoder: Encoder, spec: DecoderSpec) -> tuple[Layer, ...]:
    """Lists the layers of the longest path from the image to the last map.

    Global average pooling, which reads everything, does not count. Interpolation to
    layer1's resolution reads the two nearest positions of layer4's.
    """
    low, high = (stride_of(encoder.tap(tap).layers) for tap in DECODER_INPUTS)
    widest = max(spec.aspp, key=lambda conv: conv.padding)
    context = (widest, spec.project, Interpolation(high // low))
    return (*encoder.tap("layer4").layers, *context, *spec.fuse)


class ASPPDecoder(nn.Module):
    """The decoder: maps taps of the encoder to a `Prediction` at layer1's stride.

    Attributes:
      spec, variant: the convolutions and how they are joined.
      num_classes: channels of the logits.
      embedding: whether to add the embedding head.
      auxiliary: whether to add the classifier on layer3, at that layer's stride.
      axis_name: devices over which batch norm is synchronized.
    """

    spec: DecoderSpec
    variant: Variant
    num_classes: int
    embedding: bool = False
    auxiliary: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        taps: Mapping[str, Array],
        *,
        train: bool,
        decoder_dropout: Mapping[str, Array] | None = None,
    ) -> Prediction:
        """Decodes "layer1", "layer4" and, for the auxiliary classifier, "layer3".

        `decoder_dropout` multiplies named maps; see `DecoderSpec.dropout_channels`.
        """
        masks = decoder_dropout or {}
        valid = self.spec.dropout_channels(
            embedding=self.embedding, auxiliary=self.auxiliary
        )
        layers.check_dropout(masks, valid)

        def conv_norm(spec: ConvSpec, name: str, x_bhwd: Array, bias=False) -> Array:
            module = layers.ConvNorm(spec, self.axis_name, use_bias=bias, name=name)
            out_bhwd = module(x_bhwd, train=train)
            if name in masks:
                out_bhwd = out_bhwd * masks[name].astype(out_bhwd.dtype)
            return out_bhwd

        def head(x_bhwd: Array, stem: str, specs, features: int, name: str):
            for i, spec in enumerate(specs):
                x_bhwd = conv_norm(spec, f"{stem}{i}", x_bhwd, self.variant.fuse_bias)
            last = layers.Scores(ConvSpec(features), use_bias=True, name=name)
            return last(x_bhwd), x_bhwd

        both_bhwd = self._join(taps, conv_norm)
        fuse = self.spec.fuse
        logits, fused = head(both_bhwd, "fuse", fuse, self.num_classes, "classifier")
        prediction = Prediction(logits=logits, decoder=fused)
        if self.embedding:
            channels = self.spec.channels
            embedding, _ = head(both_bhwd, "embed", fuse, channels, "embedding")
            prediction = prediction.replace(embedding=embedding)
        if self.auxiliary:
            tap, one = taps[AUXILIARY_INPUT], fuse[:1]
            extra, _ = head(tap, "auxiliary", one, self.num_classes, "auxiliary")
            prediction = prediction.replace(auxiliary=extra)
        return prediction

    def _join(self, taps: Mapping[str, Array], conv_norm: Callable) -> Array:
        """Concatenates layer1's part and layer4's context at layer1's resolution."""
        low_bhwd, high_bhwd = (taps[tap] for tap in DECODER_INPUTS)
        branches = [
            conv_norm(spec, f"aspp{i}", high_bhwd)
            for i, spec in enumerate(self.spec.aspp)
        ]
        mean_bhwd = _global_mean(high_bhwd)
        pooled_bhwd = jnp.broadcast_to(
            conv_norm(self.spec.pool, "aspp_pool", mean_bhwd), branches[0].shape
        )
        branches.insert(0 if self.variant.pool_first else len(branches), pooled_bhwd)
        context_bhwd = jnp.concatenate(branches, axis=-1)
        context_bhwd = conv_norm(self.spec.project, "project", context_bhwd)
        detail_bhwd = conv_norm(
            self.spec.low_level, "low_level", low_bhwd, self.variant.low_level_bias
        )
        _, rows, columns, _ = low_bhwd.shape
        context_bhwd = resize_align_corners(context_bhwd, (rows, columns))
        return jnp.concatenate([detail_bhwd, context_bhwd], axis=-1)


def _global_mean(x_bhwd: Array) -> Array:
    """Averages (b,h,w,d) to (b,1,1,d), summed in at least float32."""
    wide_bhwd = at_least_float32(x_bhwd)
    return jnp.mean(wide_bhwd, axis=(1, 2), keepdims=True).astype(x_bhwd.dtype)
