"""The decoder of UniMatch's U-Net for ACDC (after Ronneberger et al. 2015).

Source: UniMatch, more-scenarios/medical/model/unet.py. Its network has only
a classifier; the embedding head and the auxiliary classifier, which U2PL and AEL need,
are this project's own (row D22 of docs/deviations.md), built like those of DeepLabV3+.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.decoders.heads import dropout_channels
from mpmc_jax.models.encoders.unet import SLOPE, STAGES, Block, stage_channels
from mpmc_jax.models.interface import Decoder, Encoder, Tap, feature_maps
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Interpolation, Layer
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.types import Prediction

Array = jax.Array

# The stage of stride 8.
AUXILIARY_INPUT = "stage4"


def build(config: ModelConfig, encoder: Encoder, axis_name: str | None) -> Decoder:
    """Builds the decoder; its longest path goes through the deepest stage."""
    channels = stage_channels(config.width)
    up: list[Layer] = [Interpolation(2), ConvSpec(1, 3), ConvSpec(1, 3)]
    layers = (*encoder.tap(STAGES[-1]).layers, *up * (len(STAGES) - 1))
    return Decoder(
        UNetDecoder(
            config.width,
            config.num_classes,
            config.embedding,
            config.auxiliary,
            axis_name,
        ),
        inputs=STAGES,
        tap=Tap(channels[0], layers),
        size_tap=STAGES[0],
        maps=feature_maps(_paths(channels)),
        dropout_channels=dropout_channels(
            channels[0], embedding=config.embedding, auxiliary=config.auxiliary
        ),
    )


def _paths(channels: tuple[int, ...]) -> list[tuple[int, int, ConvSpec]]:
    """Lists (input channels, input stride, convolution), without the heads."""
    found = []
    for i in reversed(range(len(channels) - 1)):
        features, conv = channels[i], ConvSpec(channels[i], 3)
        found.append((channels[i + 1], 2 ** (i + 1), ConvSpec(features)))
        found += [(2 * features, 2**i, conv), (features, 2**i, conv)]
    return found


class UNetDecoder(nn.Module):
    """The decoder: maps the stages to a `Prediction` at the image's size.

    Attributes:
      width: width of the encoder.
      num_classes: channels of the logits.
      embedding: whether to add the embedding head on the last map.
      auxiliary: whether to add the classifier on the stage of stride 8.
      axis_name: devices over which batch norm is synchronized.
    """

    width: int
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
        """Decodes all stages; `decoder_dropout` is as in `interface.Decoder`."""
        masks, channels = decoder_dropout or {}, stage_channels(self.width)
        valid = dropout_channels(
            channels[0], embedding=self.embedding, auxiliary=self.auxiliary
        )
        layers.check_dropout(masks, valid)
        x_bhwd = self._climb(taps, train)

        def conv_norm(name: str, x_bhwd: Array) -> Array:
            spec = ConvSpec(channels[0], 3)
            module = layers.ConvNorm(spec, self.axis_name, True, SLOPE, name=name)
            out_bhwd = module(x_bhwd, train=train)
            if name in masks:
                out_bhwd = out_bhwd * masks[name].astype(out_bhwd.dtype)
            return out_bhwd

        def scores(spec: ConvSpec, name: str, x_bhwd: Array) -> Array:
            return layers.Scores(spec, use_bias=True, name=name)(x_bhwd)

        logits = scores(ConvSpec(self.num_classes, 3), "classifier", x_bhwd)
        prediction = Prediction(logits=logits, decoder=x_bhwd)
        if self.embedding:
            inner = conv_norm("embed1", conv_norm("embed0", x_bhwd))
            embedding = scores(ConvSpec(channels[0]), "embedding", inner)
            prediction = prediction.replace(embedding=embedding)
        if self.auxiliary:
            inner = conv_norm("auxiliary0", taps[AUXILIARY_INPUT])
            extra = scores(ConvSpec(self.num_classes), "auxiliary", inner)
            prediction = prediction.replace(auxiliary=extra)
        return prediction

    def _climb(self, taps: Mapping[str, Array], train: bool) -> Array:
        """Upsamples from the deepest stage to the first, each joined to its skip."""
        x_bhwd = taps[STAGES[-1]]
        skips = list(zip(STAGES, stage_channels(self.width), strict=True))[-2::-1]
        for i, (stage, features) in enumerate(skips, start=1):
            reduce = layers.Conv(
                ConvSpec(features), use_bias=True, name=f"up{i}_reduce"
            )
            skip_bhwd = taps[stage]
            _, rows, columns, _ = skip_bhwd.shape
            x_bhwd = resize_align_corners(reduce(x_bhwd), (rows, columns))
            x_bhwd = jnp.concatenate([skip_bhwd, x_bhwd], axis=-1)
            block = Block(features, axis_name=self.axis_name, name=f"up{i}")
            x_bhwd = block(x_bhwd, None, train)
        return x_bhwd
