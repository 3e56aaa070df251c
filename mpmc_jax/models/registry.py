"""From a `ModelConfig` to a network and the facts that others ask of it."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.decoders import aspp, deeplabv3plus, unet
from mpmc_jax.models.encoders import resnet
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.receptive_field import ReceptiveField, Window, compose
from mpmc_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Tap:
    """A named intermediate map: its channels and the windows that lead to it."""

    channels: int
    windows: tuple[Window, ...]


class FeatureMap(NamedTuple):
    """What a convolution gives: its channels, its stride, and the kernel's weights."""

    channels: int
    stride: int
    weights: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A segmenter and its taps.

    Attributes:
      module: with `encode`, `decode` and `upsample`.
      taps: every map that a patch classifier may read, by name.
      decoder_inputs: the taps that the decoder reads, that of its own size first.
      maps: what the convolutions give, those of the added heads left out.
      default_tap: the early tap of stride 4 that MPMC reads unless told otherwise.
      dropout_channels: maps of the decoder whose channels U2PL and AEL drop.
      element_dropout: whether the encoder drops single elements in train mode.
    """

    module: nn.Module
    taps: dict[str, Tap]
    decoder_inputs: tuple[str, ...]
    maps: tuple[FeatureMap, ...]
    default_tap: str
    dropout_channels: dict[str, int]
    element_dropout: bool = False


def _deeplabv3plus(config: ModelConfig) -> Architecture:
    variant = aspp.VARIANTS[config.variant]
    encoder = resnet.resnet_spec(
        resnet.BACKBONES[config.backbone],
        width=config.width,
        output_stride=variant.output_stride,
        layer4_dilations=variant.layer4_dilations,
        ceil_pool=variant.ceil_pool,
        zero_init_residual=variant.zero_init_residual,
    )
    spec = aspp.decoder_spec(variant, config.width)
    module = deeplabv3plus.DeepLabV3Plus(
        encoder_spec=encoder,
        decoder_spec=spec,
        variant=variant,
        num_classes=config.num_classes,
        embedding=config.embedding,
        auxiliary=config.auxiliary,
        dtype=config.dtype,
        remat=config.remat,
    )
    taps = {
        layer: Tap(encoder.channels(layer), tuple(encoder.windows(layer)))
        for layer in resnet.LAYERS
    }
    windows = aspp.decoder_windows(encoder, spec)
    taps["decoder"] = Tap(spec.channels, tuple(windows))
    return Architecture(
        module,
        taps,
        aspp.DECODER_INPUTS,
        _maps(config, [*encoder.paths(), *aspp.decoder_paths(encoder, spec)]),
        default_tap="layer1",
        dropout_channels=spec.dropout_channels(
            embedding=config.embedding, auxiliary=config.auxiliary
        ),
    )


def _unet(config: ModelConfig) -> Architecture:
    module = unet.UNet(
        width=config.width,
        num_classes=config.num_classes,
        dtype=config.dtype,
        remat=config.remat,
        embedding=config.embedding,
        auxiliary=config.auxiliary,
    )
    channels = unet.stage_channels(config.width)
    taps = {
        stage: Tap(features, tuple(unet.stage_windows(stage)))
        for stage, features in zip(unet.STAGES, channels, strict=True)
    }
    taps["decoder"] = Tap(channels[0], tuple(unet.decoder_windows()))
    return Architecture(
        module,
        taps,
        unet.STAGES,
        _maps(config, unet.paths(config.width)),
        default_tap=unet.DEFAULT_TAP,
        dropout_channels=unet.dropout_channels(
            config.width, embedding=config.embedding, auxiliary=config.auxiliary
        ),
        element_dropout=True,
    )


def _maps(
    config: ModelConfig, paths: Iterable[tuple[int, int, ConvSpec]]
) -> tuple[FeatureMap, ...]:
    """From (input channels or 0 for the image's, stride of the input, convolution)."""
    return tuple(
        FeatureMap(
            conv.features,
            stride * conv.stride,
            (channels or config.in_channels) * conv.features * conv.kernel**2,
        )
        for channels, stride, conv in paths
    )


# One line an architecture; `config.NAMES` lists the same names.
ARCHITECTURES = {"deeplabv3plus": _deeplabv3plus, "unet": _unet}


def build_segmenter(config: ModelConfig, *, axis_name: str | None = None) -> nn.Module:
    """The network of a config, its batch norm synchronized over `axis_name`."""
    return _architecture(config).module.clone(axis_name=axis_name)


def init_variables(key: Array, config: ModelConfig) -> dict[str, PyTree]:
    """Fresh variables: {"params": {"backbone", "decoder"}, "batch_stats": ...}."""
    # Shapes of variables do not depend on the image size; 32 pixels are enough.
    images_bhwc = jnp.zeros((1, 32, 32, config.in_channels), jnp.float32)
    return jax.jit(build_segmenter(config).init)(key, images_bhwc)


def feature_maps(config: ModelConfig) -> tuple[FeatureMap, ...]:
    """What the network's convolutions give, those of added heads left out.

    A map of an image of n pixels has at least n // stride rows.
    """
    return _architecture(config).maps


def tap_channels(config: ModelConfig, tap: str) -> int:
    """Channels of a tap; ValueError lists the valid names."""
    return _tap(config, tap).channels


def perturbed_taps(config: ModelConfig) -> dict[str, int]:
    """Name and channels of the encoder outputs that the decoder reads.

    UniMatch's feature perturbation drops channels of exactly these.
    """
    names = _architecture(config).decoder_inputs
    return {name: tap_channels(config, name) for name in names}


def dropout_channels(config: ModelConfig) -> dict[str, int]:
    """Maps of the decoder whose channels U2PL and AEL drop -> their channels."""
    return _architecture(config).dropout_channels


def element_dropout(config: ModelConfig) -> bool:
    """Whether a train-mode `encode` drops elements, and so asks for keys."""
    return _architecture(config).element_dropout


def default_tap(config: ModelConfig) -> str:
    """The tap that MPMC reads where the configuration leaves it open."""
    return _architecture(config).default_tap


def decoder_size_tap(config: ModelConfig) -> str:
    """The tap of the encoder that is as large as the decoder's last map."""
    return _architecture(config).decoder_inputs[0]


def receptive_field(config: ModelConfig, tap: str) -> ReceptiveField:
    """What one position of a tap sees, from the network's own windows.

    Counts convolutions and max-pooling; global average pooling does not count. The
    tap "decoder" takes the widest path, upsampling included, so its field is an upper
    bound (and assumes the sizes at which the grids of both paths coincide: 16 n + 1).

    Raises:
      ValueError: the network has no such tap; the message lists its taps.
    """
    return compose(_tap(config, tap).windows)


def _architecture(config: ModelConfig) -> Architecture:
    return ARCHITECTURES[config.name](config)


def _tap(config: ModelConfig, tap: str) -> Tap:
    taps = _architecture(config).taps
    if tap not in taps:
        raise ValueError(f"tap {tap!r} of {config.title}: valid are {', '.join(taps)}")
    return taps[tap]
