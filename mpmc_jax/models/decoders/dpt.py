"""The DPT head of UniMatch V2 on four levels of tokens (Ranftl et al. 2021).

Source: UniMatch V2, model/semseg/dpt.py and model/util/blocks.py, without its second
convolution unit at the deepest level, which nothing reads. There is no batch norm. The
embedding head and the auxiliary classifier are this project's own.
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.decoders.heads import FurtherHeads, dropout_channels
from mpmc_jax.models.interface import Decoder, Encoder, FeatureMap, Tap
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Interpolation, Layer, stride_of
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.types import Prediction

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Channels of the fused maps, and of the four levels before fusion."""

    fused: int
    levels: tuple[int, int, int, int]


# By the channels of the encoder's tokens; others follow the first two's proportions.
SIZES = {
    384: Sizes(64, (48, 96, 192, 384)),
    768: Sizes(128, (96, 192, 384, 768)),
    1024: Sizes(256, (256, 512, 1024, 1024)),
}


def sizes(channels: int, width: int) -> Sizes:
    """Returns the channels of the head for tokens of an encoder of that width."""
    full = channels * 64 // width
    found = SIZES.get(full, Sizes(full // 6, (full // 8, full // 4, full // 2, full)))
    first, second, third, fourth = (max(each * width // 64, 1) for each in found.levels)
    return Sizes(max(found.fused * width // 64, 1), (first, second, third, fourth))


def build(config: ModelConfig, encoder: Encoder, axis_name: str | None) -> Decoder:
    """Builds the head for an encoder with four levels of one stride."""
    del axis_name
    inputs = encoder.four_levels()
    tap = encoder.tap(inputs[-1])
    found = sizes(tap.channels, config.width)
    return Decoder(
        DPTDecoder(
            inputs, found, config.num_classes, config.embedding, config.auxiliary
        ),
        inputs=inputs,
        tap=Tap(found.fused, (*tap.layers, *_layers())),
        maps=_maps(found, tap.channels, stride_of(tap.layers)),
        dropout_channels=dropout_channels(
            found.fused, embedding=config.embedding, auxiliary=config.auxiliary
        ),
    )


def _layers() -> list[Layer]:
    """Lists the layers of the longest path, from the last level to the last map."""
    conv = ConvSpec(1, 3)
    fusion: list[Layer] = [conv, conv, Interpolation(2)]
    return [ConvSpec(1, 3, 2), conv, *fusion * 4, conv]


def _maps(
    sizes: Sizes, channels: int, stride: int | Fraction
) -> tuple[FeatureMap, ...]:
    """Lists the outputs of the convolutions, without the heads."""
    fused, maps = sizes.fused, []
    for i, features in enumerate(sizes.levels):
        level = stride * Fraction(2**i, 4)
        maps.append(FeatureMap(features, stride, channels * features))
        if i != 2:
            maps.append(FeatureMap(features, level, (16, 4, 0, 9)[i] * features**2))
        maps.append(FeatureMap(fused, level, 9 * features * fused))
        units = 2 if i == 3 else 4
        maps += [FeatureMap(fused, level, 9 * fused**2)] * units
        maps.append(FeatureMap(fused, level / 2, fused**2))
    return (*maps, FeatureMap(fused, Fraction(stride, 8), 9 * fused**2))


class TransposedConv(nn.Module):
    """A transposed convolution whose windows do not overlap: (b,h,w,i) -> (b,kh,kw,o).

    The kernel is (k,k,o,i), as that of the convolution that it transposes.
    """

    features: int
    factor: int

    @nn.compact
    def __call__(self, x_bhwi: Array) -> Array:
        """Maps every position to a square of `factor` positions."""
        batch, rows, columns, channels = x_bhwi.shape
        k, features, dtype = self.factor, self.features, x_bhwi.dtype
        shape = (k, k, features, channels)
        # PyTorch's fan-in of a transposed convolution is that of its output.
        kernel = self.param("kernel", layers.torch_uniform, shape, jnp.float32)
        bias_init = layers.symmetric_uniform((k**2 * features) ** -0.5)
        bias = self.param("bias", bias_init, (features,), jnp.float32)
        out = jnp.einsum("bhwi,uvoi->bhuwvo", x_bhwi, kernel.astype(dtype))
        out_bhwo = out.reshape(batch, k * rows, k * columns, features)
        return out_bhwo + bias[None, None, None].astype(dtype)


class ConvUnit(nn.Module):
    """A residual unit: x + conv(relu(conv(relu(x))))."""

    @nn.compact
    def __call__(self, x_bhwd: Array) -> Array:
        """Keeps the shape."""
        spec = ConvSpec(x_bhwd.shape[-1], 3)
        out_bhwd = x_bhwd
        for i in (1, 2):
            out_bhwd = layers.Conv(spec, use_bias=True, name=f"conv{i}")(
                nn.relu(out_bhwd)
            )
        return x_bhwd + out_bhwd


class Fusion(nn.Module):
    """Adds a level to the deeper ones, and resizes the sum."""

    @nn.compact
    def __call__(
        self, level_bhwd: Array, deeper_bhwd: Array | None, size: tuple[int, int]
    ) -> Array:
        """Maps both (b,h,w,d) to (b,*size,d)."""
        x_bhwd = level_bhwd
        if deeper_bhwd is not None:
            x_bhwd = deeper_bhwd + ConvUnit(name="skip")(level_bhwd)
        x_bhwd = resize_align_corners(ConvUnit(name="unit")(x_bhwd), size)
        return layers.Conv(ConvSpec(x_bhwd.shape[-1]), use_bias=True, name="out")(
            x_bhwd
        )


class DPTDecoder(nn.Module):
    """The decoder: maps four levels to a `Prediction` at an eighth of their stride.

    Attributes:
      inputs: the taps of the four levels.
      sizes: channels of the maps.
      num_classes: channels of the logits.
      embedding: whether to add the embedding head.
      auxiliary: whether to add the classifier on the third level.
    """

    inputs: tuple[str, ...]
    sizes: Sizes
    num_classes: int
    embedding: bool = False
    auxiliary: bool = False

    @nn.compact
    def __call__(
        self,
        taps: Mapping[str, Array],
        *,
        train: bool,
        decoder_dropout: Mapping[str, Array] | None = None,
    ) -> Prediction:
        """Decodes the levels; `decoder_dropout` multiplies maps of other heads."""
        del train
        fused = self.sizes.fused
        levels = [
            layers.Conv(ConvSpec(fused, 3), name=f"layer{i + 1}")(level_bhwd)
            for i, level_bhwd in enumerate(self._pyramid(taps))
        ]
        x_bhwd = None
        for i in reversed(range(len(levels))):
            _, rows, columns, _ = levels[max(i - 1, 0)].shape
            factor = 1 if i else 2
            x_bhwd = Fusion(name=f"fusion{i + 1}")(
                levels[i], x_bhwd, (factor * rows, factor * columns)
            )
        assert x_bhwd is not None  # There are four levels.
        last_bhwd = nn.relu(
            layers.Conv(ConvSpec(fused, 3), use_bias=True, name="output")(x_bhwd)
        )
        classifier = layers.Scores(
            ConvSpec(self.num_classes), use_bias=True, name="classifier"
        )
        prediction = Prediction(logits=classifier(last_bhwd), decoder=last_bhwd)
        heads = FurtherHeads(
            fused, self.num_classes, self.embedding, self.auxiliary, name="further"
        )
        return heads(prediction, x_bhwd, taps[self.inputs[2]], decoder_dropout)

    def _pyramid(self, taps: Mapping[str, Array]) -> list[Array]:
        """Projects the levels and resizes them by 4, 2, 1 and 1/2."""
        found = []
        for i, features in enumerate(self.sizes.levels):
            project = layers.Conv(
                ConvSpec(features), use_bias=True, name=f"project{i + 1}"
            )
            level_bhwd, name = project(taps[self.inputs[i]]), f"resize{i + 1}"
            if i < 2:
                level_bhwd = TransposedConv(features, (4, 2)[i], name=name)(level_bhwd)
            if i == 3:
                level_bhwd = layers.Conv(
                    ConvSpec(features, 3, 2), use_bias=True, name=name
                )(level_bhwd)
            found.append(level_bhwd)
        return found
