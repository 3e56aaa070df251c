"""The U-Net of UniMatch's ACDC (after Ronneberger et al. 2015), in two halves.

Source: UniMatch, more-scenarios/medical/model/unet.py. Its network has a classifier
alone; the embedding and auxiliary heads, which U2PL and AEL need, are this project's
(D22), built as DeepLabV3+'s are.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.normalization import at_least_float32
from mpmc_jax.models.receptive_field import Interpolation, Window
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.types import Features, Prediction

Array = jax.Array

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")
# The stage of stride 4, as DeepLabV3+'s layer1 is, and that of stride 8.
DEFAULT_TAP = "stage3"
AUXILIARY_INPUT = "stage4"

# Share of the elements that each stage of the encoder drops in training.
_DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)
_SLOPE = 0.01
_MULTIPLE = 2 ** (len(STAGES) - 1)


def stage_channels(width: int) -> tuple[int, ...]:
    """Channels of the five stages: 16 to 256 at width 64."""
    return tuple(width // 4 * 2**i for i in range(len(STAGES)))


def stage_windows(stage: str) -> list[Window]:
    """The chain of windows from the image to a stage's output."""
    pair: list[Window] = [ConvSpec(1, 3), ConvSpec(1, 3)]
    pool = ConvSpec(1, 2, stride=2)
    return pair + [pool, *pair] * STAGES.index(stage)


def decoder_windows() -> list[Window]:
    """The longest path to the decoder's last map, through the deepest stage."""
    up: list[Window] = [Interpolation(2), ConvSpec(1, 3), ConvSpec(1, 3)]
    return stage_windows(STAGES[-1]) + up * (len(STAGES) - 1)


def paths(width: int) -> list[tuple[int, int, ConvSpec]]:
    """Channels (0: the image's) and stride of every convolution's input, and it.

    Encoder and decoder, without the heads.
    """
    channels, found, given = stage_channels(width), [], 0
    for i, features in enumerate(channels):
        conv = ConvSpec(features, 3)
        found += [(given, 2**i, conv), (features, 2**i, conv)]
        given = features
    for i in reversed(range(len(channels) - 1)):
        features, conv = channels[i], ConvSpec(channels[i], 3)
        found.append((channels[i + 1], 2 ** (i + 1), ConvSpec(features)))
        found += [(2 * features, 2**i, conv), (features, 2**i, conv)]
    return found


def dropout_channels(width: int, *, embedding: bool, auxiliary: bool) -> dict[str, int]:
    """Maps of the added heads whose channels U2PL and AEL drop -> their channels."""
    names = ["embed0", "embed1"] if embedding else []
    names += ["auxiliary0"] if auxiliary else []
    return dict.fromkeys(names, stage_channels(width)[0])


class Block(nn.Module):
    """Twice convolution, batch norm and leaky ReLU, with dropout in between."""

    features: int
    rate: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_bhwc: Array, noise: Array | None, train: bool) -> Array:
        """(b,h,w,i) -> (b,h,w,features); `noise` are (b,) keys or None."""
        spec = ConvSpec(self.features, 3)
        for i in range(2):
            conv = layers.ConvNorm(spec, self.axis_name, True, False, name=f"conv{i}")
            x_bhwc = nn.leaky_relu(conv(x_bhwc, train=train), _SLOPE)
            if i == 0 and noise is not None:
                x_bhwc = element_dropout(noise, x_bhwc, self.rate)
        return x_bhwc


def element_dropout(keys_b: Array, x_bhwc: Array, rate: float) -> Array:
    """Drops single elements and scales the others by 1 / (1 - rate).

    An example's mask follows from its key alone, wherever in the batch it stands.
    """
    shape = x_bhwc.shape[1:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys_b)
    return jnp.where(keep, x_bhwc / (1 - rate), 0)


class Encoder(nn.Module):
    """Images -> the maps of the five stages, each half as large as the one before."""

    width: int
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x_bhwc: Array, *, until: str | None, train: bool, noise: Array | None
    ) -> dict[str, Array]:
        """All stages, or those up to `until`; `noise` are (b,) keys or None."""
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        taps = {}
        channels = stage_channels(self.width)
        for i, (stage, features) in enumerate(zip(STAGES, channels, strict=True)):
            if i:
                x_bhwc = nn.max_pool(x_bhwc, (2, 2), (2, 2))
            keys = None
            if noise is not None:
                keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(noise)
            module = block(features, _DROPOUT[i], self.axis_name, name=stage)
            x_bhwc = module(x_bhwc, keys, train)
            taps[stage] = x_bhwc
            if stage == until:
                break
        return taps


class Decoder(nn.Module):
    """The stages -> Prediction at the image's size.

    Attributes:
      width: of the encoder.
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
        dropout: Mapping[str, Array] | None = None,
    ) -> Prediction:
        """All stages; `dropout` multiplies named maps, see `dropout_channels`."""
        masks = dropout or {}
        valid = dropout_channels(
            self.width, embedding=self.embedding, auxiliary=self.auxiliary
        )
        if not set(masks) <= set(valid):
            raise ValueError(f"dropout of {sorted(masks)}: valid are {sorted(valid)}")
        channels = stage_channels(self.width)
        x_bhwd = self._climb(taps, train)

        def conv_norm(name: str, x_bhwd: Array) -> Array:
            spec = ConvSpec(channels[0], 3)
            module = layers.ConvNorm(spec, self.axis_name, True, False, name=name)
            out_bhwd = nn.leaky_relu(module(x_bhwd, train=train), _SLOPE)
            if name in masks:
                out_bhwd = out_bhwd * masks[name].astype(out_bhwd.dtype)
            return out_bhwd

        prediction = Prediction(
            logits=_last(ConvSpec(self.num_classes, 3), "classifier")(x_bhwd),
            decoder=x_bhwd,
        )
        if self.embedding:
            inner = conv_norm("embed1", conv_norm("embed0", x_bhwd))
            embedding = _last(ConvSpec(channels[0]), "embedding")(inner)
            prediction = prediction.replace(embedding=embedding)
        if self.auxiliary:
            inner = conv_norm("auxiliary0", taps[AUXILIARY_INPUT])
            extra = _last(ConvSpec(self.num_classes), "auxiliary")(inner)
            prediction = prediction.replace(auxiliary=extra)
        return prediction

    def _climb(self, taps: Mapping[str, Array], train: bool) -> Array:
        """From the deepest stage to the first, each joined as [skip, upsampled]."""
        x_bhwd = taps[STAGES[-1]]
        skips = list(zip(STAGES, stage_channels(self.width), strict=True))[-2::-1]
        for i, (stage, features) in enumerate(skips, start=1):
            reduce = layers.Conv(ConvSpec(features), True, name=f"up{i}_reduce")
            skip_bhwd = taps[stage]
            _, rows, columns, _ = skip_bhwd.shape
            x_bhwd = resize_align_corners(reduce(x_bhwd), (rows, columns))
            x_bhwd = jnp.concatenate([skip_bhwd, x_bhwd], axis=-1)
            block = Block(features, axis_name=self.axis_name, name=f"up{i}")
            x_bhwd = block(x_bhwd, None, train)
        return x_bhwd


def _last(spec: ConvSpec, name: str) -> Callable[[Array], Array]:
    """A head's last convolution, in at least float32; made inside a compact call."""
    conv = layers.Conv(spec, True, name=name)
    return lambda x_bhwd: conv(at_least_float32(x_bhwd))


class UNet(nn.Module):
    """A segmenter in two halves, as `DeepLabV3Plus` is.

    Images are (b,h,w,c), normalized, with sides that are multiples of 16. They are
    computed in `dtype`, or in float64 where they are float64.

    Attributes:
      width: 64 as published.
      num_classes: channels of the logits.
      embedding, auxiliary: whether those heads are there.
      dtype: compute dtype; parameters and statistics are float32 always.
      axis_name: devices over which batch norm is synchronized, or None.
      remat: recompute the encoder's blocks in the backward pass.
    """

    width: int
    num_classes: int
    embedding: bool = False
    auxiliary: bool = False
    dtype: str = "float32"
    axis_name: str | None = None
    remat: bool = False

    def setup(self) -> None:
        """Name the two halves: variables and learning rates go by these names."""
        self.backbone = Encoder(self.width, self.axis_name, self.remat)
        self.decoder = Decoder(
            self.width,
            self.num_classes,
            self.embedding,
            self.auxiliary,
            self.axis_name,
        )

    def encode(
        self,
        images_bhwc: Array,
        *,
        until: str | None = None,
        train: bool = False,
        noise: Array | None = None,
    ) -> Features:
        """Images -> the taps stage1 to stage5, or those up to `until`.

        `noise` are (b,) keys of the dropout, which acts in train mode alone.

        Raises:
          ValueError: `until` names no stage, or a side is no multiple of 16.
        """
        if until is not None and until not in STAGES:
            raise ValueError(f"encode(until={until!r}): valid are {', '.join(STAGES)}")
        _, rows, columns, _ = images_bhwc.shape
        if rows % _MULTIPLE or columns % _MULTIPLE:
            raise ValueError(
                f"the U-Net halves images of {rows}x{columns} pixels four times: both "
                f"sides must be multiples of {_MULTIPLE}; set data.crop and "
                f"eval.pad_to to such"
            )
        is_double = images_bhwc.dtype == jnp.float64
        x_bhwc = images_bhwc if is_double else images_bhwc.astype(self.dtype)
        noise = noise if train else None
        taps = self.backbone(x_bhwc, until=until, train=train, noise=noise)
        return Features(taps=taps, size=(rows, columns))

    def decode(
        self,
        features: Features,
        *,
        train: bool = False,
        dropout: Mapping[str, Array] | None = None,
    ) -> Prediction:
        """Features of all stages -> Prediction at the image's size."""
        return self.decoder(features.taps, train=train, dropout=dropout)

    @nn.nowrap
    def upsample(self, logits_bhwc: Array, size: tuple[int, int]) -> Array:
        """(b,h,w,c) at any stride -> (b,*size,c), align-corners bilinear."""
        return resize_align_corners(logits_bhwc, size)

    def __call__(self, images_bhwc: Array, *, train: bool = False) -> Prediction:
        """Images -> Prediction whose logits (auxiliary ones too) have their size."""
        features = self.encode(images_bhwc, train=train)
        prediction = self.decode(features, train=train)
        if prediction.auxiliary is not None:
            extra = self.upsample(prediction.auxiliary, features.size)
            prediction = prediction.replace(auxiliary=extra)
        return prediction
