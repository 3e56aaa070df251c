"""The descriptions of encoders and decoders, all that other code knows of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from flax import linen as nn

from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import Layer


@dataclasses.dataclass(frozen=True)
class Tap:
    """A named intermediate feature map, which a decoder or a plug-in reads.

    Attributes:
      channels: its channels.
      layers: the layers (kernel, stride, padding) on the way from the image to it.
    """

    channels: int
    layers: tuple[Layer, ...]


# (value, shape) -> the value of a variable for another size of the training crop.
Adapter = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class FeatureMap(NamedTuple):
    """A layer's output: channels, stride, and number of the kernel's weights."""

    channels: int
    stride: int | Fraction
    weights: int


def multiples_around(side: int, multiple: int) -> tuple[int, int]:
    """Returns the multiples below and above a side that is none, both positive."""
    below = max(side // multiple, 1) * multiple
    return below, below + multiple


def check_crop(side: int, multiple: int, needs: str) -> None:
    """Raises ValueError if the training crop is no multiple; `needs` says of what."""
    if side % multiple or not side:
        below, above = multiples_around(side, multiple)
        raise ValueError(
            f"data.crop={side}: {needs}; the next ones are {below} and {above}"
        )


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The first half of a network.

    Attributes:
      module: (images, until=, train=) -> the taps by name, up to `until`; with
        `has_dropout` it also takes `dropout_keys=`, (b,) keys.
      taps: its taps in the order in which they are computed.
      default_tap: the early tap that MPMC reads by default.
      first_kernel: path of the parameter whose last but one axis are image channels.
      maps: outputs of its convolutions and dense layers, for the memory estimate.
      multiple: sides of training crops must be multiples of this.
      has_dropout: whether it has standard dropout or stochastic depth in train
        mode.
      has_variants: whether it depends on `ModelConfig.variant`.
      levels: four taps of one stride for decoders of several levels; () for none.
      resizes_images: whether images of other sides are resized to the nearest
        multiples for a prediction, and the logits back; False pads them.
      normalization: that of RGB images, a key of `pixels.NORMALIZATIONS`.
      adapters: path of each variable whose shape depends on the training crop -> how
        weights for another crop are adapted. Without an entry they are refused.
    """

    module: nn.Module
    taps: Mapping[str, Tap]
    default_tap: str
    first_kernel: tuple[str, ...]
    maps: tuple[FeatureMap, ...] = ()
    multiple: int = 1
    has_dropout: bool = False
    has_variants: bool = False
    levels: tuple[str, ...] = ()
    resizes_images: bool = False
    normalization: str = "imagenet"
    adapters: Mapping[tuple[str, ...], Adapter] = dataclasses.field(
        default_factory=dict
    )

    def tap(self, name: str) -> Tap:
        """Returns a tap that a decoder reads.

        Raises:
          ValueError: the encoder has no such tap.
        """
        if name not in self.taps:
            raise ValueError(
                f"the decoder reads the tap {name!r}, and the encoder has "
                f"{', '.join(self.taps)}; set another --config.model.backbone or "
                "--config.model.name"
            )
        return self.taps[name]

    def four_levels(self) -> tuple[str, ...]:
        """Returns the levels that a decoder of several levels reads.

        Raises:
          ValueError: the encoder has none.
        """
        if not self.levels:
            raise ValueError(
                "the decoder reads four levels of tokens, and the encoder has only "
                f"{', '.join(self.taps)}; set --config.model.backbone to a vision "
                "transformer such as dinov2_s14, or another --config.model.name"
            )
        return self.levels


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The second half of a network.

    Attributes:
      module: (taps, train=, decoder_dropout=) -> Prediction at the decoder's own
        stride; `decoder_dropout` has a multiplier for each of `dropout_channels`, or is
        None. With `has_dropout` it also takes `dropout_keys=`, (b,) keys.
      inputs: the encoder's taps that it reads.
      tap: its last map, the tap "decoder".
      size_tap: the encoder's tap that is as large as the last map; "" for none.
      maps: outputs of its convolutions without the heads, for the memory estimate.
      dropout_channels: maps whose channels U2PL and AEL drop -> their channels.
      has_variants: whether it depends on `ModelConfig.variant`.
      has_dropout: whether it has standard dropout or stochastic depth in train
        mode.
      half_pixel: whether logits are upsampled with half-pixel centers; False: with
        aligned corners.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    tap: Tap
    size_tap: str = ""
    maps: tuple[FeatureMap, ...] = ()
    dropout_channels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    has_variants: bool = False
    has_dropout: bool = False
    half_pixel: bool = False


def feature_maps(
    paths: Iterable[tuple[int, int | Fraction, ConvSpec]],
) -> tuple[FeatureMap, ...]:
    """Lists the outputs of (input channels, input stride, convolution) entries."""
    return tuple(
        FeatureMap(
            conv.features,
            stride * conv.stride,
            channels * conv.features * conv.kernel**2,
        )
        for channels, stride, conv in paths
    )
