"""Channel dropout: masks that a method draws and a network multiplies by."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpmc_jax.random_keys import Keys
from mpmc_jax.types import Array


def feature_dropout_mask(
    keys_b: Array, channels: int, *, rate: float = 0.5, dtype: jnp.dtype = jnp.float32
) -> Array:
    """Masks that drop whole channels of a feature map and scale the survivors.

    Args:
      keys_b: (b,) keys, one an example.
      channels: channels of the feature map.
      rate: probability that a channel is dropped, in [0, 1).
      dtype: of the mask; the feature map's.

    Returns:
      (b,1,1,channels), 0 or 1 / (1 - rate).

    Raises:
      ValueError: rate is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: a dropout rate lies in [0, 1)")
    kept = jax.vmap(
        lambda key: jax.random.bernoulli(key, 1.0 - rate, (1, 1, channels))
    )(keys_b)
    return kept.astype(dtype) / (1 - rate)


def decoder_dropout(
    keys: Keys,
    network: str,
    streams: Sequence[str],
    channels: tuple[tuple[str, int], ...],
) -> dict[str, Array]:
    """U2PL's and AEL's masks for one pass: map of the decoder -> (n,1,1,channels).

    Args:
      keys: of the step.
      network: whose pass it is.
      streams: the images of the pass, one after the other; each as many as records.
      channels: (map, channels).
    """
    each = [keys.examples(f"dropout/{network}/{stream}") for stream in streams]
    return channel_dropout(jnp.concatenate(each), channels)


def channel_dropout(
    keys_b: Array, channels: tuple[tuple[str, int], ...]
) -> dict[str, Array]:
    """Drops a tenth of the channels of several maps: name -> (b,1,1,channels)."""
    if not channels:
        return {}
    names = [name for name, _ in channels]
    sizes = [size for _, size in channels]
    # One draw for all: every call of the generator compiles to a program of its own.
    joined = feature_dropout_mask(keys_b, sum(sizes), rate=0.1)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return dict(zip(names, jnp.split(joined, ends, axis=-1), strict=True))
