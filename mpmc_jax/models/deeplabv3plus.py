"""DeepLabV3+ (Chen et al. 2018) as the semi-supervised methods' authors built it.

The published networks differ in small things that change every number: `VARIANTS`
holds those differences, and nothing else depends on the variant.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Interpolation, stride_of
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.models.resnet import LAYERS, ResNet, ResNetSpec
from mpmc_jax.types import Features, Prediction

Array = jax.Array

ASPP_RATES = (6, 12, 18)
# Encoder outputs that the decoder reads.
DECODER_INPUTS = ("layer1", "layer4")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the published networks differ.

    Attributes:
      layer4_dilations: of the 3x3 convolutions of layer4's blocks ("multi-grid").
      ceil_pool: the encoder's max-pool rounds its output size up.
      zero_init_residual: each residual block starts as the identity.
      low_level_bias: the convolution on layer1 has a bias (batch norm follows).
      pool_first: the image-pooling branch leads the ASPP concatenation.
    """

    layer4_dilations: tuple[int, int, int]
    ceil_pool: bool
    zero_init_residual: bool
    low_level_bias: bool
    pool_first: bool


VARIANTS = {
    "unimatch": Variant(
        layer4_dilations=(1, 2, 2),
        ceil_pool=False,
        zero_init_residual=False,
        low_level_bias=False,
        pool_first=False,
    ),
    "augseg": Variant(
        layer4_dilations=(2, 4, 8),
        ceil_pool=True,
        zero_init_residual=True,
        low_level_bias=True,
        pool_first=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """The decoder's convolutions; published channel counts in brackets."""

    aspp: tuple[ConvSpec, ...]  # 256 each: 1x1, then one 3x3 a rate
    pool: ConvSpec  # 256, after global average pooling
    project: ConvSpec  # 256
    low_level: ConvSpec  # 48
    fuse: tuple[ConvSpec, ...]  # 256 each, 3x3

    @property
    def channels(self) -> int:
        """Channels of the last map before the classifier."""
        return self.fuse[-1].features


def decoder_spec(width: int) -> DecoderSpec:
    """The decoder for a backbone of that width (64 as published)."""
    features = 4 * width
    return DecoderSpec(
        aspp=(
            ConvSpec(features),
            *(ConvSpec(features, 3, dilation=rate) for rate in ASPP_RATES),
        ),
        pool=ConvSpec(features),
        project=ConvSpec(features),
        low_level=ConvSpec(3 * width // 4),
        fuse=(ConvSpec(features, 3), ConvSpec(features, 3)),
    )


class Decoder(nn.Module):
    """layer1 and layer4 -> logits at layer1's stride, and the map before them."""

    spec: DecoderSpec
    variant: Variant
    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, low_bhwd: Array, high_bhwd: Array, *, train: bool
    ) -> tuple[Array, Array]:
        """Two taps -> (logits, last map), both at the first one's resolution."""

        def conv_norm(spec: ConvSpec, name: str, x_bhwd: Array, bias=False) -> Array:
            module = layers.ConvNorm(spec, self.axis_name, use_bias=bias, name=name)
            return module(x_bhwd, train=train)

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
        fused_bhwd = jnp.concatenate([detail_bhwd, context_bhwd], axis=-1)
        for i, spec in enumerate(self.spec.fuse):
            fused_bhwd = conv_norm(spec, f"fuse{i}", fused_bhwd)
        classifier = layers.Conv(ConvSpec(self.num_classes), True, name="classifier")
        return classifier(layers.at_least_float32(fused_bhwd)), fused_bhwd


class DeepLabV3Plus(nn.Module):
    """A segmenter in two halves, `encode` and `decode`.

    Images are (b,h,w,c), normalised, of any size from 17 pixels up. They are computed
    in `dtype`, or in float64 where they are float64; parameters and statistics stay
    float32, logits are at least that.

    Attributes:
      encoder_spec: from `resnet_spec`.
      decoder_spec: from `decoder_spec`.
      variant: a row of `VARIANTS`.
      num_classes: channels of the logits.
      dtype: compute dtype.
      axis_name: devices over which batch norm is synchronised, or None.
      remat: recompute the encoder's activations in the backward pass.
    """

    encoder_spec: ResNetSpec
    decoder_spec: DecoderSpec
    variant: Variant
    num_classes: int
    dtype: str = "float32"
    axis_name: str | None = None
    remat: bool = False

    def setup(self) -> None:
        """Name the two halves: variables and learning rates go by these names."""
        self.backbone = ResNet(self.encoder_spec, self.axis_name, self.remat)
        self.decoder = Decoder(
            self.decoder_spec, self.variant, self.num_classes, self.axis_name
        )

    def encode(
        self, images_bhwc: Array, *, until: str | None = None, train: bool = False
    ) -> Features:
        """Images -> the taps layer1 to layer4, or those up to `until`.

        Raises:
          ValueError: `until` names no layer of the encoder.
        """
        if until is not None and until not in LAYERS:
            raise ValueError(f"encode(until={until!r}): valid are {', '.join(LAYERS)}")
        is_double = images_bhwc.dtype == jnp.float64
        x_bhwc = images_bhwc if is_double else images_bhwc.astype(self.dtype)
        taps = self.backbone(x_bhwc, until=until, train=train)
        _, rows, columns, _ = images_bhwc.shape
        return Features(taps=taps, size=(rows, columns))

    def decode(self, features: Features, *, train: bool = False) -> Prediction:
        """Features of all layers -> Prediction at layer1's stride."""
        low_bhwd, high_bhwd = (features.taps[tap] for tap in DECODER_INPUTS)
        logits_bhwc, decoder_bhwd = self.decoder(low_bhwd, high_bhwd, train=train)
        return Prediction(logits=logits_bhwc, decoder=decoder_bhwd)

    @nn.nowrap
    def upsample(self, logits_bhwc: Array, size: tuple[int, int]) -> Array:
        """(b,h,w,c) at any stride -> (b,*size,c), align-corners bilinear."""
        return resize_align_corners(logits_bhwc, size)

    def __call__(self, images_bhwc: Array, *, train: bool = False) -> Prediction:
        """Images -> Prediction whose logits have the images' size."""
        features = self.encode(images_bhwc, train=train)
        prediction = self.decode(features, train=train)
        logits_bhwc = self.upsample(prediction.logits, features.size)
        return prediction.replace(logits=logits_bhwc)


def decoder_windows(
    encoder: ResNetSpec, decoder: DecoderSpec
) -> list[ConvSpec | Interpolation]:
    """The decoder's longest path from the image: what its last map can see.

    Global average pooling, which sees everything, does not count. Interpolation to
    layer1's resolution reads the two nearest positions of layer4's.
    """
    low, high = (stride_of(encoder.windows(tap)) for tap in DECODER_INPUTS)
    widest = max(decoder.aspp, key=lambda conv: conv.padding)
    upsampling = Interpolation(high // low)
    return [*encoder.windows("layer4"), widest, upsampling, *decoder.fuse]


def _global_mean(x_bhwd: Array) -> Array:
    """(b,h,w,d) -> (b,1,1,d), summed in at least float32."""
    wide_bhwd = layers.at_least_float32(x_bhwd)
    return jnp.mean(wide_bhwd, axis=(1, 2), keepdims=True).astype(x_bhwd.dtype)
