"""A segmentation network of any encoder and decoder."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import normalization
from mpmc_jax.models.interface import multiples_around
from mpmc_jax.models.resize import resize_align_corners, resize_half_pixel
from mpmc_jax.types import Features, Prediction

Array = jax.Array


class EncoderDecoder(nn.Module):
    """A segmenter of an encoder and a decoder.

    Images are (b,h,w,c), normalized. The network computes in `dtype`, or in float64 for
    float64 images; parameters and statistics are float32, logits at least float32.

    Attributes:
      backbone: the `module` of an `Encoder`. Variables and learning rates use the names
        of these two fields.
      decoder: the `module` of a `Decoder`.
      num_classes: channels of the logits.
      taps: names of the encoder's taps.
      multiple: sides of images for `encode` must be multiples of this.
      resizes_images: whether `__call__` resizes other images to the nearest multiples,
        and the logits back; otherwise it repeats their last rows and columns up to the
        next multiples, and crops the logits.
      half_pixel: whether logits are upsampled with half-pixel centers instead of
        aligned corners.
      has_dropout: whether the encoder has dropout, and whether the decoder has.
      dtype: compute dtype.
      freeze_encoder: whether the encoder is constant: it runs in evaluation mode, and
        no gradient is computed there.
    """

    backbone: nn.Module
    decoder: nn.Module
    num_classes: int
    taps: tuple[str, ...]
    multiple: int = 1
    resizes_images: bool = False
    half_pixel: bool = False
    has_dropout: tuple[bool, bool] = (False, False)
    dtype: str = "float32"
    freeze_encoder: bool = False

    def encode(
        self,
        images_bhwc: Array,
        *,
        until: str | None = None,
        train: bool = False,
        dropout_keys: Array | None = None,
        passes: int = 1,
    ) -> Features:
        """Computes the encoder's taps, or those up to `until`, from images.

        Args:
          images_bhwc: normalized images.
          until: the last tap that is computed; None for all.
          train: whether batch norm and dropout are in train mode.
          dropout_keys: (b,) keys for parts with dropout. The decoder finds its keys in
            the result.
          passes: number of equal parts of the batch that train mode normalizes as if
            they were encoded in a row.

        Raises:
          ValueError: `until` names no tap, or a side is no multiple of `multiple`.
        """
        if until is not None and until not in self.taps:
            valid = ", ".join(self.taps)
            raise ValueError(f"encode(until={until!r}): valid are {valid}")
        _, rows, columns, _ = images_bhwc.shape
        if rows % self.multiple or columns % self.multiple:
            side = rows if rows % self.multiple else columns
            below, above = multiples_around(side, self.multiple)
            raise ValueError(
                f"the network does not take images of {rows}x{columns} pixels: both "
                f"sides must be multiples of {self.multiple}; set data.crop to one: "
                f"the next ones are {below} and {above}"
            )
        is_double = images_bhwc.dtype == jnp.float64
        x_bhwc = images_bhwc if is_double else images_bhwc.astype(self.dtype)
        for_encoder, for_decoder = (
            dropout_keys if train and has else None for has in self.has_dropout
        )
        train = train and not self.freeze_encoder
        drawn = {}
        if train and for_encoder is not None:
            drawn["dropout_keys"] = for_encoder
        with normalization.in_passes(passes):
            taps = self.backbone(x_bhwc, until=until, train=train, **drawn)
        if self.freeze_encoder:
            taps = jax.lax.stop_gradient(taps)
        return Features(taps=taps, size=(rows, columns), dropout_keys=for_decoder)

    def decode(
        self,
        features: Features,
        *,
        train: bool = False,
        decoder_dropout: Mapping[str, Array] | None = None,
        passes: int = 1,
    ) -> Prediction:
        """Computes a `Prediction` at the decoder's stride from features of all taps.

        Args:
          features: the result of `encode`.
          train: whether batch norm is in train mode.
          decoder_dropout: map of the decoder -> (b,1,1,d) multiplier of its channels.
          passes: as of `encode`.
        """
        drawn = {}
        if train and features.dropout_keys is not None:
            drawn["dropout_keys"] = features.dropout_keys
        with normalization.in_passes(passes):
            return self.decoder(
                features.taps, train=train, decoder_dropout=decoder_dropout, **drawn
            )

    @nn.nowrap
    def upsample(self, logits_bhwc: Array, size: tuple[int, int]) -> Array:
        """Resizes (b,h,w,c) to (b,*size,c), bilinearly."""
        if self.half_pixel:
            return resize_half_pixel(logits_bhwc, size)
        # Of float64 images everything is computed in float64, see `encode`.
        narrow = None if logits_bhwc.dtype == jnp.float64 else self.dtype
        return resize_align_corners(logits_bhwc, size, gradient_dtype=narrow)

    def __call__(self, images_bhwc: Array, *, train: bool = False) -> Prediction:
        """Predicts logits, auxiliary ones too, at the size of the images."""
        _, *sides, _ = images_bhwc.shape
        size = sides[0], sides[1]
        if self.resizes_images:
            nearest = self._nearest(sides[0]), self._nearest(sides[1])
            images_bhwc = resize_align_corners(images_bhwc, nearest)
        elif self.multiple > 1:
            below, right = (-side % self.multiple for side in sides)
            padding = ((0, 0), (0, below), (0, right), (0, 0))
            images_bhwc = jnp.pad(images_bhwc, padding, mode="edge")
        features = self.encode(images_bhwc, train=train)
        prediction = self.decode(features, train=train)

        def full(logits_bhwc: Array) -> Array:
            whole_bhwc = self.upsample(logits_bhwc, features.size)
            if self.resizes_images:
                return resize_align_corners(whole_bhwc, size)
            return whole_bhwc[:, : size[0], : size[1]]

        prediction = prediction.replace(logits=full(prediction.logits))
        if prediction.auxiliary is not None:
            prediction = prediction.replace(auxiliary=full(prediction.auxiliary))
        return prediction

    @nn.nowrap
    def _nearest(self, side: int) -> int:
        """Returns the nearest side that is a multiple; a half is rounded up."""
        number = (2 * side + self.multiple) // (2 * self.multiple)
        return max(number, 1) * self.multiple
