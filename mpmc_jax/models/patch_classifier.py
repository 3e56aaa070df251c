"""MPMC's patch classifier: predicts the classes in each receptive field (eq. 2)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpmc_jax.models import layers
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.pooling import (
    VALID_WINDOWS,
    WINDOWS,
    add_pooled,
    multi_scale_pool,
)

Array = jax.Array

# Widths of the three blocks at `width` 64: "paper" as published, "lite" narrower (row
# D16 of docs/deviations.md).
BLOCK_WIDTHS = {"paper": (256, 128, 64), "lite": (64, 64, 64)}
PROJECTION = 64


class ScaleProjection(nn.Module):
    """Equals a 1x1 projection of the concatenated scales.

    One convolution with the kernels of all scales reads the tap once; each scale's
    projection is pooled by its window, and they are added.
    """

    features: int
    windows: tuple[int, ...]

    @nn.compact
    def __call__(self, z_bhwd: Array) -> Array:
        """Maps (b,h,w,d) to (b,h,w,features)."""
        spec, channels = ConvSpec(self.features), z_bhwd.shape[-1]
        kernels = [
            layers.Conv(spec, name=f"window{w}").parameters(channels)[0]
            for w in self.windows
        ]
        together = ConvSpec(self.features * len(kernels))
        kernel = jnp.concatenate(kernels, axis=-1)
        joined_bhwd = layers.convolution(together, z_bhwd, kernel)
        return add_pooled(joined_bhwd, self.windows)


class PatchClassifier(nn.Module):
    """Maps a tap to logits of the classes in every position's receptive field.

    "paper": the tap pooled at every window, concatenated, through three blocks of
    widths 256, 128, 64; a block is conv3x3, conv3x3, conv1x1, each without bias and
    followed by batch norm and ReLU. Then one linear layer with bias.
    "lite": each scale is first projected to 64 channels by its own 1x1 kernel and the
    projections are added; blocks of width 64. Projection commutes with pooling, so
    64 channels per scale are pooled, and the tap's own channels never are.

    Computes in the dtype of the tap; logits are float32, or float64 for such input.

    Attributes:
      num_classes: channels of the logits.
      head: a key of `BLOCK_WIDTHS`.
      windows: pooling windows, any non-empty selection of (1, 3, 7, 19).
      axis_name: devices over which batch norm is synchronized, or None.
      width: multiplies all widths by width/64; 64 keeps the published ones.
    """

    num_classes: int
    head: str = "paper"
    windows: tuple[int, ...] = WINDOWS
    axis_name: str | None = None
    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in BLOCK_WIDTHS:
            raise ValueError(
                f"mpmc.head={self.head!r}: valid are {', '.join(BLOCK_WIDTHS)}"
            )
        windows = tuple(self.windows)
        known = set(windows) <= set(VALID_WINDOWS)
        if not windows or not known or len(set(windows)) < len(windows):
            raise ValueError(
                f"mpmc.windows={windows}: must be one or more of {VALID_WINDOWS}, "
                "each once"
            )

    @nn.compact
    def __call__(self, z_bhwd: Array, *, train: bool) -> Array:
        """Maps (b,h,w,d) to (b,h,w,num_classes)."""
        if self.head == "lite":
            features = PROJECTION * self.width // 64
            x_bhwd = ScaleProjection(features, self.windows, name="project")(z_bhwd)
        else:
            x_bhwd = multi_scale_pool(z_bhwd, self.windows)
        for i, features in enumerate(BLOCK_WIDTHS[self.head]):
            features = features * self.width // 64
            for j, kernel in enumerate((3, 3, 1)):
                x_bhwd = layers.ConvNorm(
                    ConvSpec(features, kernel),
                    self.axis_name,
                    name=f"block{i}_conv{j}",
                )(x_bhwd, train=train)
        scores = layers.Scores(
            ConvSpec(self.num_classes), use_bias=True, name="classifier"
        )
        return scores(x_bhwd)
