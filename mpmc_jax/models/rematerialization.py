"""Activations that the backward pass recomputes instead of reading them from memory.

Between "off" and "all" lies "cheap": the outputs of convolutions and dense layers are
kept, with the statistics of batch norm. Norms, activations and attention weights are
recomputed, so that no convolution runs twice and no device communicates twice.
"""

from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# Valid values of `ModelConfig.remat`.
REMATS = ("off", "cheap", "all")

_KEPT = "kept"


def keep(x: Array) -> Array:
    """Marks an array that "cheap" keeps for the backward pass."""
    return checkpoint_name(x, _KEPT)


def rematerialized(block: Any, remat: str, static_argnums: tuple[int, ...] = ()) -> Any:
    """Makes a module that recomputes its activations in the backward pass.

    Args:
      block: the class of a module, or a function whose first argument is a module.
      remat: one of `REMATS`; "off" returns the block itself.
      static_argnums: positions of static arguments of its call, counted with self.
    """
    if remat == "off":
        return block
    policy = None
    if remat == "cheap":
        policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return nn.remat(block, policy=policy, static_argnums=static_argnums)
