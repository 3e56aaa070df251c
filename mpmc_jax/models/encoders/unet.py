"""The encoder of UniMatch's U-Net for ACDC (after Ronneberger et al. 2015).

Source: UniMatch, more-scenarios/medical/model/unet.py.
"""

import jax
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.interface import Encoder, Tap, check_crop, feature_maps
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Layer
from mpmc_jax.models.rematerialization import rematerialized

Array = jax.Array

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")
SLOPE = 0.01  # of the leaky ReLU
_STRIDE = 2 ** (len(STAGES) - 1)

# Share of the elements that each stage drops in training.
_DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)


def build(config: ModelConfig, axis_name: str | None) -> Encoder:
    """Builds the encoder; the stage of stride 4 is its early tap.

    Raises:
      ValueError: the training crop cannot be halved four times.
    """
    channels = stage_channels(config.width)
    check_crop(config.image_size, _STRIDE, f"the U-Net needs a multiple of {_STRIDE}")
    return Encoder(
        UNetEncoder(config.width, axis_name, config.remat),
        taps={
            stage: Tap(features, tuple(_layers(stage)))
            for stage, features in zip(STAGES, channels, strict=True)
        },
        default_tap="stage3",
        first_kernel=("stage1", "conv0", "conv", "kernel"),
        maps=feature_maps(_paths(config.in_channels, channels)),
        multiple=_STRIDE,
        has_dropout=True,
    )


def stage_channels(width: int) -> tuple[int, ...]:
    """Returns the channels of the five stages: 16 to 256 at width 64."""
    return tuple(width // 4 * 2**i for i in range(len(STAGES)))


def _layers(stage: str) -> list[Layer]:
    """Lists the layers from the image to a stage's output."""
    pair: list[Layer] = [ConvSpec(1, 3), ConvSpec(1, 3)]
    pool = ConvSpec(1, 2, stride=2)
    return pair + [pool, *pair] * STAGES.index(stage)


def _paths(
    in_channels: int, channels: tuple[int, ...]
) -> list[tuple[int, int, ConvSpec]]:
    """Lists (input channels, input stride, convolution)."""
    found, given = [], in_channels
    for i, features in enumerate(channels):
        conv = ConvSpec(features, 3)
        found += [(given, 2**i, conv), (features, 2**i, conv)]
        given = features
    return found


class Block(nn.Module):
    """A block of twice convolution, batch norm, leaky ReLU; dropout in between."""

    features: int
    rate: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_bhwc: Array, dropout_keys: Array | None, train: bool) -> Array:
        """Maps (b,h,w,i) to (b,h,w,features); `dropout_keys` are (b,) keys or None."""
        spec = ConvSpec(self.features, 3)
        for i in range(2):
            conv = layers.ConvNorm(spec, self.axis_name, True, SLOPE, name=f"conv{i}")
            x_bhwc = conv(x_bhwc, train=train)
            if i == 0 and dropout_keys is not None:
                x_bhwc = layers.element_dropout(dropout_keys, x_bhwc, self.rate)
        return x_bhwc


class UNetEncoder(nn.Module):
    """The encoder: maps images to five stages, each half as large as the previous."""

    width: int
    axis_name: str | None = None
    remat: str = "off"

    @nn.compact
    def __call__(
        self,
        x_bhwc: Array,
        *,
        until: str | None,
        train: bool,
        dropout_keys: Array | None = None,
    ) -> dict[str, Array]:
        """Computes all stages up to `until`; `dropout_keys` are (b,) keys or None."""
        block = rematerialized(Block, self.remat, static_argnums=(3,))
        taps = {}
        channels = stage_channels(self.width)
        for i, (stage, features) in enumerate(zip(STAGES, channels, strict=True)):
            if i:
                x_bhwc = nn.max_pool(x_bhwc, (2, 2), (2, 2))
            keys = None
            if dropout_keys is not None:
                fold = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))
                keys = fold(dropout_keys)
            module = block(features, _DROPOUT[i], self.axis_name, name=stage)
            x_bhwc = module(x_bhwc, keys, train)
            taps[stage] = x_bhwc
            if stage == until:
                break
        return taps
