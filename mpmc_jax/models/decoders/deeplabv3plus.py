"""DeepLabV3+ (Chen et al. 2018) on a residual network, in two halves."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models.decoders.aspp import Decoder, DecoderSpec, Variant
from mpmc_jax.models.encoders.resnet import LAYERS, ResNet, ResNetSpec
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.types import Features, Prediction

Array = jax.Array


class DeepLabV3Plus(nn.Module):
    """A segmenter in two halves, `encode` and `decode`.

    Images are (b,h,w,c), normalized, of any size from 17 pixels up. They are computed
    in `dtype`, or in float64 where they are float64; parameters and statistics stay
    float32, logits are at least that.

    Attributes:
      encoder_spec: from `resnet_spec`.
      decoder_spec: from `decoder_spec`.
      variant: a row of `VARIANTS`.
      num_classes: channels of the logits.
      embedding, auxiliary: whether those heads are there.
      dtype: compute dtype.
      axis_name: devices over which batch norm is synchronized, or None.
      remat: recompute the encoder's activations in the backward pass.
    """

    encoder_spec: ResNetSpec
    decoder_spec: DecoderSpec
    variant: Variant
    num_classes: int
    embedding: bool = False
    auxiliary: bool = False
    dtype: str = "float32"
    axis_name: str | None = None
    remat: bool = False

    def setup(self) -> None:
        """Name the two halves: variables and learning rates go by these names."""
        self.backbone = ResNet(self.encoder_spec, self.axis_name, self.remat)
        self.decoder = Decoder(
            self.decoder_spec,
            self.variant,
            self.num_classes,
            self.embedding,
            self.auxiliary,
            self.axis_name,
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

    def decode(
        self,
        features: Features,
        *,
        train: bool = False,
        dropout: Mapping[str, Array] | None = None,
    ) -> Prediction:
        """Features of all layers -> Prediction at layer1's stride.

        Args:
          features: what `encode` gave.
          train: whether batch norm is in train mode.
          dropout: map of the decoder -> (b,1,1,d) multiplier of its channels.
        """
        return self.decoder(features.taps, train=train, dropout=dropout)

    @nn.nowrap
    def upsample(self, logits_bhwc: Array, size: tuple[int, int]) -> Array:
        """(b,h,w,c) at any stride -> (b,*size,c), align-corners bilinear."""
        return resize_align_corners(logits_bhwc, size)

    def __call__(self, images_bhwc: Array, *, train: bool = False) -> Prediction:
        """Images -> Prediction whose logits (auxiliary ones too) have their size."""
        features = self.encode(images_bhwc, train=train)
        prediction = self.decode(features, train=train)
        full = self.upsample(prediction.logits, features.size)
        prediction = prediction.replace(logits=full)
        if prediction.auxiliary is not None:
            extra = self.upsample(prediction.auxiliary, features.size)
            prediction = prediction.replace(auxiliary=extra)
        return prediction
