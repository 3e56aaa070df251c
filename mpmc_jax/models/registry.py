"""The registry of encoders and decoders: from a `ModelConfig` to a network.

A new encoder or decoder is one file with a `build` function and one line here. Other
code of this package asks the functions below what it must know about a network, and
does not test a network's name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.decoders import deeplabv3plus, dpt, segmenter
from mpmc_jax.models.decoders import unet as unet_decoder
from mpmc_jax.models.encoder_decoder import EncoderDecoder
from mpmc_jax.models.encoders import resnet, vit
from mpmc_jax.models.encoders import unet as unet_encoder
from mpmc_jax.models.interface import Adapter, Decoder, Encoder, FeatureMap, Tap
from mpmc_jax.models.receptive_field import ReceptiveField, compose
from mpmc_jax.text import did_you_mean
from mpmc_jax.types import Array, PyTree

# Functions of a configuration and the axis over which batch norm is synchronized.
BuildEncoder = Callable[[ModelConfig, str | None], Encoder]
BuildDecoder = Callable[[ModelConfig, Encoder, str | None], Decoder]

# Images from which variables are initialized are at least this large.
_LEAST_SIDE = 32


class DecoderEntry(NamedTuple):
    """A decoder, and its own encoder; None: it takes `ModelConfig.backbone`."""

    build: BuildDecoder
    encoder: BuildEncoder | None = None


# By `ModelConfig.backbone`.
ENCODERS: dict[str, BuildEncoder] = {
    **dict.fromkeys(resnet.BACKBONES, resnet.build),
    **dict.fromkeys(vit.BACKBONES, vit.build),
}
# By `ModelConfig.name`.
DECODERS: dict[str, DecoderEntry] = {
    "deeplabv3plus": DecoderEntry(deeplabv3plus.build),
    "unet": DecoderEntry(unet_decoder.build, encoder=unet_encoder.build),
    "segmenter": DecoderEntry(segmenter.build),
    "segmenter_linear": DecoderEntry(segmenter.build_linear),
    "dpt": DecoderEntry(dpt.build),
}


def build_segmenter(
    config: ModelConfig, *, axis_name: str | None = None
) -> EncoderDecoder:
    """Builds the network of a config, its batch norm synchronized over `axis_name`.

    Raises:
      ValueError: an unknown encoder or decoder (the message lists the valid ones), or
        two that do not fit each other.
    """
    encoder, decoder = _encoder_and_decoder(config, axis_name)
    return EncoderDecoder(
        backbone=encoder.module,
        decoder=decoder.module,
        num_classes=config.num_classes,
        taps=tuple(encoder.taps),
        multiple=encoder.multiple,
        resizes_images=encoder.resizes_images,
        half_pixel=decoder.half_pixel,
        has_dropout=(encoder.has_dropout, decoder.has_dropout),
        dtype=config.dtype,
        freeze_encoder=config.freeze == "encoder",
    )


@functools.partial(jax.jit, static_argnames="config")
def init_variables(key: Array, config: ModelConfig) -> dict[str, PyTree]:
    """Initializes variables {"params": {"backbone", "decoder"}, "batch_stats": ...}.

    The statistics are an empty dictionary for a network without batch norm. Jitted, so
    that a network is traced once however often shapes or values are asked for.
    """
    module = build_segmenter(config)
    # Shapes of variables may depend on `config.image_size`, and on nothing here.
    side = -(-_LEAST_SIDE // module.multiple) * module.multiple
    images_bhwc = jnp.zeros((1, side, side, config.in_channels), jnp.float32)
    return {"batch_stats": {}, **module.init(key, images_bhwc)}


def identifying_fields(config: ModelConfig) -> tuple[str, ...]:
    """Lists the configuration's fields that select this network among all."""
    encoder, decoder = _encoder_and_decoder(config)
    names = ["name"]
    if DECODERS[config.name].encoder is None:
        names.append("backbone")
    if encoder.has_variants or decoder.has_variants:
        names.append("variant")
    return tuple(names)


def title(config: ModelConfig) -> str:
    """Names the network and its parts, for messages."""
    chosen, text = identifying_fields(config), config.name
    if "backbone" in chosen:
        text += f"/{config.backbone}"
    return f"{text}, variant {config.variant}" if "variant" in chosen else text


def same_encoder(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two networks' encoders have the same variables, except for `width`."""
    first, second = (_build_encoder(config) for config in (one, other))
    return first is second and (
        "backbone" not in identifying_fields(one) or one.backbone == other.backbone
    )


def encoder_normalization(name: str, backbone: str) -> str:
    """Returns an encoder's normalization of RGB images, a key of `NORMALIZATIONS`.

    Raises:
      ValueError: an unknown encoder or decoder; the message lists the valid ones.
    """
    config = ModelConfig(name=name, backbone=backbone)
    return _build_encoder(config)(config, None).normalization


def reads_drop_path(name: str, backbone: str) -> bool:
    """Whether the network has the stochastic depth of `ModelConfig.drop_path`.

    Raises:
      ValueError: an unknown encoder or decoder; the message lists the valid ones.
    """
    config = ModelConfig(name=name, backbone=backbone)
    dropping = dataclasses.replace(config, drop_path=0.1)
    build = _build_encoder(config)
    return build(config, None).module != build(dropping, None).module


def adapters(config: ModelConfig) -> dict[tuple[str, ...], Adapter]:
    """Returns how weights for another training crop are adapted, by variable path."""
    encoder, _ = _encoder_and_decoder(config)
    return {
        ("params", "backbone", *path): adapter
        for path, adapter in encoder.adapters.items()
    }


def first_kernel(config: ModelConfig) -> tuple[str, ...]:
    """Returns the path, within the variables, of the kernel that reads the image."""
    encoder, _ = _encoder_and_decoder(config)
    return ("params", "backbone", *encoder.first_kernel)


def feature_maps(config: ModelConfig) -> tuple[FeatureMap, ...]:
    """Lists the outputs of the network's convolutions, without those of added heads.

    A map of an image of n pixels has at least n // stride rows.
    """
    encoder, decoder = _encoder_and_decoder(config)
    return encoder.maps + decoder.maps


def tap_channels(config: ModelConfig, tap: str) -> int:
    """Returns the channels of a tap; a ValueError lists the valid names."""
    return _tap(config, tap).channels


def perturbed_taps(config: ModelConfig) -> dict[str, int]:
    """Maps the encoder outputs that the decoder reads to their channels.

    UniMatch's feature perturbation drops channels of exactly these.
    """
    encoder, decoder = _encoder_and_decoder(config)
    return {name: encoder.taps[name].channels for name in decoder.inputs}


def dropout_channels(config: ModelConfig) -> dict[str, int]:
    """Returns the decoder's maps whose channels U2PL and AEL drop, with their sizes."""
    _, decoder = _encoder_and_decoder(config)
    return dict(decoder.dropout_channels)


def has_dropout(config: ModelConfig) -> bool:
    """Whether the network has dropout in train mode, so that `encode` needs keys."""
    encoder, decoder = _encoder_and_decoder(config)
    return encoder.has_dropout or decoder.has_dropout


def default_tap(config: ModelConfig) -> str:
    """Returns the tap that MPMC reads by default."""
    encoder, _ = _encoder_and_decoder(config)
    return encoder.default_tap


def decoder_size_tap(config: ModelConfig) -> str:
    """Returns a tap as large as the decoder's last map, if possible of the encoder."""
    _, decoder = _encoder_and_decoder(config)
    return decoder.size_tap or "decoder"


def receptive_field(config: ModelConfig, tap: str) -> ReceptiveField:
    """Computes the receptive field of a tap from the network's layers.

    Counts convolutions and max-pooling; global average pooling does not count. The
    tap "decoder" takes the widest path, upsampling included, so its field is an upper
    bound (and assumes the sizes at which the grids of both paths coincide: 16 n + 1).

    Raises:
      ValueError: the network has no such tap; the message lists its taps.
    """
    return compose(_tap(config, tap).layers)


def _encoder_and_decoder(
    config: ModelConfig, axis_name: str | None = None
) -> tuple[Encoder, Decoder]:
    encoder = _build_encoder(config)(config, axis_name)
    return encoder, DECODERS[config.name].build(config, encoder, axis_name)


def _build_encoder(config: ModelConfig) -> BuildEncoder:
    own = _choose("name", config.name, DECODERS).encoder
    return own or _choose("backbone", config.backbone, ENCODERS)


def _choose(field: str, name: str, entries: Mapping[str, Any]) -> Any:
    if name not in entries:
        raise ValueError(
            f"model.{field}={name!r}: {did_you_mean(name, entries)}valid are "
            f"{', '.join(entries)}"
        )
    return entries[name]


def _tap(config: ModelConfig, tap: str) -> Tap:
    encoder, decoder = _encoder_and_decoder(config)
    taps = {**encoder.taps, "decoder": decoder.tap}
    if tap not in taps:
        valid = ", ".join(taps)
        raise ValueError(f"tap {tap!r} of {title(config)}: valid are {valid}")
    return taps[tap]
