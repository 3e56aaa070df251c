"""The whole of a run between two steps."""

import jax
import numpy as np
from flax import struct

from mpmc_jax.types import Array, PyTree


class TrainState(struct.PyTreeNode):
    """What a step takes and returns; a run is a function of config, data and seed.

    `params` and `batch_stats` hold one tree a network, by name, and the plug-in's under
    `PLUGIN`, so that optimiser, average and checkpoint treat all of them alike.

    Attributes:
      step: () int32, optimiser updates so far; also the position in the data.
      params, batch_stats: the students' and the plug-in's.
      ema_params, ema_batch_stats: the averaged teacher's, or None.
      opt_state: the optimiser's.
      method_state: the base method's own (banks, confidences).
      key: root of every random key of the run; never changes.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    ema_params: PyTree
    ema_batch_stats: PyTree
    opt_state: PyTree
    method_state: PyTree
    key: Array


PLUGIN = "plugin"


def to_host(state: TrainState) -> TrainState:
    """The state as NumPy; the key stays a key."""
    return jax.tree.map(np.asarray, state.replace(key=None)).replace(key=state.key)
