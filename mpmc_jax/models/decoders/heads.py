"""The further heads that U2PL and AEL need, on networks that were published without.

They are this project's own, like those of the U-Net: convolutions with ReLU, whose
channels may be dropped, and a last linear convolution.
"""

from collections.abc import Mapping

import jax
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.types import Prediction

Array = jax.Array


def dropout_channels(
    features: int, *, embedding: bool, auxiliary: bool
) -> dict[str, int]:
    """Returns the heads' maps whose channels U2PL and AEL drop, with their channels."""
    names = ["embed0", "embed1"] if embedding else []
    names += ["auxiliary0"] if auxiliary else []
    return dict.fromkeys(names, features)


class FurtherHeads(nn.Module):
    """Adds an embedding and auxiliary logits to a prediction, if asked for.

    Attributes:
      features: channels of every map and of the embedding.
      num_classes: channels of the auxiliary logits.
      embedding: whether to add the embedding head.
      auxiliary: whether to add the auxiliary classifier.
    """

    features: int
    num_classes: int
    embedding: bool
    auxiliary: bool

    @nn.compact
    def __call__(
        self,
        prediction: Prediction,
        deep_bhwd: Array,
        middle_bhwd: Array | None,
        decoder_dropout: Mapping[str, Array] | None,
    ) -> Prediction:
        """Reads the embedding from a deep map, the auxiliary logits from a middle one.

        The middle one is only needed for these.
        `decoder_dropout` multiplies named maps; see `dropout_channels`.
        """
        masks = decoder_dropout or {}
        valid = dropout_channels(
            self.features, embedding=self.embedding, auxiliary=self.auxiliary
        )
        layers.check_dropout(masks, valid)

        def conv(name: str, x_bhwd: Array) -> Array:
            module = layers.Conv(ConvSpec(self.features, 3), use_bias=True, name=name)
            out_bhwd = nn.relu(module(x_bhwd))
            if name in masks:
                out_bhwd = out_bhwd * masks[name].astype(out_bhwd.dtype)
            return out_bhwd

        def last(features: int, name: str, x_bhwd: Array) -> Array:
            return layers.Scores(ConvSpec(features), use_bias=True, name=name)(x_bhwd)

        if self.embedding:
            inner = conv("embed1", conv("embed0", deep_bhwd))
            prediction = prediction.replace(
                embedding=last(self.features, "embedding", inner)
            )
        if self.auxiliary and middle_bhwd is not None:
            inner = conv("auxiliary0", middle_bhwd)
            prediction = prediction.replace(
                auxiliary=last(self.num_classes, "auxiliary", inner)
            )
        return prediction
