"""Segmenter's decoders on the tokens of a vision transformer (Strudel et al. 2021).

Source: segm/model/decoder.py. The embedding head and the auxiliary classifier are this
project's own.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.decoders.heads import FurtherHeads, dropout_channels
from mpmc_jax.models.interface import Decoder, Encoder, FeatureMap
from mpmc_jax.models.receptive_field import stride_of
from mpmc_jax.models.transformer import Block, Dense, LayerNorm, small_normal
from mpmc_jax.precision import at_least_float32
from mpmc_jax.types import Prediction

Array = jax.Array

_EPSILON = 1e-5
_DEPTH = 2
# Share of the elements that the mask transformer drops in train mode, as published.
# Where UniMatch decodes clean and perturbed features in one batch, each has keys of its
# own.
_DROPOUT = 0.1


def build(config: ModelConfig, encoder: Encoder, axis_name: str | None) -> Decoder:
    """Builds the mask transformer: class embeddings attend to the last tokens."""
    features = encoder.tap(encoder.four_levels()[-1]).channels
    per_block = tuple(
        FeatureMap(outputs * features, 1, inputs * outputs * features**2)
        for inputs, outputs in ((1, 3), (1, 1), (1, 4), (4, 1))
    )
    project = FeatureMap(features, 1, features**2)
    return _build(config, encoder, (project, *per_block * _DEPTH), mask=True)


def build_linear(
    config: ModelConfig, encoder: Encoder, axis_name: str | None
) -> Decoder:
    """Builds the linear decoder: a classifier of the last tokens."""
    return _build(config, encoder, (), mask=False)


def _build(
    config: ModelConfig,
    encoder: Encoder,
    maps: tuple[FeatureMap, ...],
    *,
    mask: bool,
) -> Decoder:
    """Builds either decoder; `maps` are those of the tokens, at stride 1."""
    *_, middle, last = encoder.four_levels()
    tap = encoder.tap(last)
    stride = stride_of(tap.layers)
    return Decoder(
        TokenDecoder(
            inputs=(middle, last),
            heads=tap.channels // config.width,
            num_classes=config.num_classes,
            mask=mask,
            attention=config.attention,
            embedding=config.embedding,
            auxiliary=config.auxiliary,
        ),
        inputs=(last,),
        tap=tap,
        size_tap=last,
        maps=tuple(each._replace(stride=stride) for each in maps),
        dropout_channels=dropout_channels(
            tap.channels, embedding=config.embedding, auxiliary=config.auxiliary
        ),
        has_dropout=mask,
        half_pixel=True,
    )


class MaskTransformer(nn.Module):
    """Scores of tokens by two blocks over the tokens and one embedding per class.

    Attributes:
      heads: attention heads.
      num_classes: number of classes.
      attention: implementation of the attention, see `ModelConfig.attention`.
    """

    heads: int
    num_classes: int
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, x_bnd: Array, dropout_keys: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps tokens (b,n,d) to logits (b,n,C) and to the last tokens (b,n,d).

        `dropout_keys` are (b,) keys or None.
        """
        batch, count, features = x_bnd.shape
        x_bnd = Dense(features, name="project")(x_bnd)
        shape = (1, self.num_classes, features)
        classes = self.param("class_embeddings", small_normal, shape, jnp.float32)
        classes_bcd = jnp.broadcast_to(classes, (batch, *shape[1:])).astype(x_bnd.dtype)
        x_bnd = jnp.concatenate([x_bnd, classes_bcd], axis=1)
        for i in range(_DEPTH):
            block = Block(
                self.heads,
                _EPSILON,
                attention=self.attention,
                dropout=0.0 if dropout_keys is None else _DROPOUT,
                name=f"block{i}",
            )
            keys = None
            if dropout_keys is not None:
                # 0 is the encoder's.
                fold = jax.vmap(lambda key, i=i: jax.random.fold_in(key, 1 + i))
                keys = fold(dropout_keys)
            x_bnd = block(x_bnd, dropout_keys=keys)
        x_bnd = LayerNorm(_EPSILON, name="norm")(x_bnd)
        patches_bnd = self._direction("patch_projection", x_bnd[:, :count])
        classes_bcd = self._direction("class_projection", x_bnd[:, count:])
        logits_bnc = jnp.einsum("bnd,bcd->bnc", patches_bnd, classes_bcd)
        return LayerNorm(_EPSILON, name="mask_norm")(logits_bnc), x_bnd[:, :count]

    def _direction(self, name: str, x_bnd: Array) -> Array:
        """Projects tokens, and divides each by its length in at least float32."""
        features = x_bnd.shape[-1]
        init = initializers.normal(features**-0.5)
        matrix = self.param(name, init, (features, features), jnp.float32)
        x_bnd = at_least_float32(x_bnd @ matrix.astype(x_bnd.dtype))
        return x_bnd / jnp.linalg.norm(x_bnd, axis=-1, keepdims=True)


class TokenDecoder(nn.Module):
    """The decoder: maps the last level to a `Prediction` at the stride of patches.

    Attributes:
      inputs: the levels that the auxiliary classifier and the decoder read.
      heads: attention heads of the mask transformer.
      num_classes: channels of the logits.
      mask: the mask transformer, or a linear classifier.
      attention: implementation of the attention.
      embedding: whether to add the embedding head.
      auxiliary: whether to add the classifier on the third of four levels.
    """

    inputs: tuple[str, str]
    heads: int
    num_classes: int
    mask: bool
    attention: str = "xla"
    embedding: bool = False
    auxiliary: bool = False

    @nn.compact
    def __call__(
        self,
        taps: Mapping[str, Array],
        *,
        train: bool,
        decoder_dropout: Mapping[str, Array] | None = None,
        dropout_keys: Array | None = None,
    ) -> Prediction:
        """Decodes the last level; `decoder_dropout` multiplies maps of other heads.

        `dropout_keys` are (b,) keys of the mask transformer, or None.
        """
        del train
        middle, last = self.inputs
        batch, rows, columns, features = taps[last].shape
        x_bnd = taps[last].reshape(batch, rows * columns, features)
        if self.mask:
            transformer = MaskTransformer(
                self.heads, self.num_classes, self.attention, name="masks"
            )
            logits_bnc, x_bnd = transformer(x_bnd, dropout_keys)
        else:
            wide_bnd = at_least_float32(x_bnd)
            logits_bnc = Dense(self.num_classes, name="classifier")(wide_bnd)
        x_bhwd = x_bnd.reshape(taps[last].shape)
        logits_bhwc = logits_bnc.reshape(batch, rows, columns, self.num_classes)
        heads = FurtherHeads(
            features, self.num_classes, self.embedding, self.auxiliary, name="further"
        )
        prediction = Prediction(logits=logits_bhwc, decoder=x_bhwd)
        return heads(prediction, x_bhwd, taps.get(middle), decoder_dropout)
