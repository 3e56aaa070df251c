"""Channel dropout: masks drawn by a method and applied in a network.

There are three kinds of dropout:

    network dropout   standard dropout and stochastic depth, which are a part of the
                      network (U-Net, vision transformers); methods give it keys
    decoder dropout   drops channels of the decoder's maps (U2PL, AEL)
    perturbation      drops channels of the encoder's outputs before they are decoded
                      (UniMatch, UniMatch V2)

The masks of the last two are drawn here.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpmc_jax.random_keys import Keys
from mpmc_jax.types import Array


def feature_dropout_mask(
    keys_b: Array, channels: int, *, rate: float = 0.5, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Draws masks that drop channels of a feature map and scale the others.

    Args:
      keys_b: (b,) keys, one per example.
      channels: channels of the feature map.
      rate: probability that a channel is dropped, in [0, 1).
      dtype: type of the mask, that of the feature map.

    Returns:
      (b,1,1,channels), 0 or 1 / (1 - rate).

    Raises:
      ValueError: rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: a dropout rate must be in [0, 1)")
    kept = jax.vmap(
        lambda key: jax.random.bernoulli(key, 1.0 - rate, (1, 1, channels))
    )(keys_b)
    return kept.astype(dtype) / (1 - rate)


def complementary_masks(
    group_keys: Array,
    channels: int,
    kept: Array,
    *,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[Array, Array]:
    """Draws UniMatch V2's pairs of masks: what one drops, the other doubles.

    Args:
      group_keys: (g,) keys.
      channels: channels of the feature map.
      kept: (g,group_size) bool, the images whose features neither mask changes; see
        `draw_kept`.
      dtype: type of the masks.

    Returns:
      Two arrays (g * group_size,1,1,channels), 0 or 2, and 1 for kept images.
    """
    shape = (kept.shape[1], 1, 1, channels)
    drawn = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, shape))(group_keys)
    first = 2 * drawn.reshape(-1, 1, 1, channels).astype(dtype)
    kept_b111 = kept.reshape(-1, 1, 1, 1)
    return jnp.where(kept_b111, 1, first), jnp.where(kept_b111, 1, 2 - first)


def draw_kept(group_keys: Array, group_size: int) -> Array:
    """Draws half of each group's images, rounded down: (g,) -> (g,group_size) bool."""

    def draw(key: Array) -> Array:
        return jax.random.permutation(key, group_size) < group_size // 2

    return jax.vmap(draw)(group_keys)


def decoder_dropout_masks(
    keys: Keys,
    network: str,
    parts: Sequence[str],
    channels: tuple[tuple[str, int], ...],
) -> dict[str, Array]:
    """Draws U2PL's decoder dropout of one pass: map -> (n,1,1,channels).

    Args:
      keys: the random keys of the step.
      network: the network of the pass, "student" or "teacher".
      parts: names of the parts of the pass's images, in order.
      channels: (map of the decoder, channels).
    """
    each = [keys.examples(f"dropout/{network}/{part}") for part in parts]
    return channel_dropout(jnp.concatenate(each), channels)


def channel_dropout(
    keys_b: Array, channels: tuple[tuple[str, int], ...]
) -> dict[str, Array]:
    """Draws masks that drop a tenth of the channels: map -> (b,1,1,channels)."""
    if not channels:
        return {}
    names = [name for name, _ in channels]
    sizes = [size for _, size in channels]
    # One draw for all maps: XLA compiles every call of the generator separately.
    joined = feature_dropout_mask(keys_b, sum(sizes), rate=0.1)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return dict(zip(names, jnp.split(joined, ends, axis=-1), strict=True))
