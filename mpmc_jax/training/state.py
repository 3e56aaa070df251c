"""The state of a run between two steps."""

import jax
import numpy as np
from flax import struct, traverse_util

from mpmc_jax.types import Array, PyTree


class TrainState(struct.PyTreeNode):
    """What a step takes and returns; a run is a function of config, data and seed.

    `params` and `batch_stats` hold one tree per network, by name, and the plug-in's
    under `PLUGIN`, so that optimizer, average and checkpoint treat all of them alike.

    The average is the exponential moving average (EMA) of what is trained, in the
    fields `ema_*`. The teacher is the network that makes the targets: the average or
    the student itself, as `Method.teacher` says. The setting eval.network=teacher
    evaluates the average, even where it makes no targets.

    Attributes:
      step: () int32, optimizer updates so far; also the position in the data.
      params, batch_stats: variables of the students and the plug-in.
      ema_params, ema_batch_stats: moving averages of the students' and the plug-in's
        variables, or None.
      opt_state: state of the optimizer.
      method_state: state of the base method (memory banks, confidences).
      key: (2,) uint32, the root of every random key of the run; never changes. Plain
        numbers: pmap over several processes takes a typed key through the host.
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


def variables_of(state: TrainState, name: str, *, averaged: bool) -> dict[str, PyTree]:
    """Returns {"params", "batch_stats"} of one network or of `PLUGIN`, {} without it.

    Args:
      averaged: whether to return those of the moving average, not the student's.
    """
    params, stats = state.params, state.batch_stats
    if averaged:
        params, stats = state.ema_params, state.ema_batch_stats
    if name not in params:
        return {}
    return {"params": params[name], "batch_stats": stats[name]}


def to_host(state: TrainState) -> TrainState:
    """Copies a state to the host, as NumPy."""
    return jax.tree.map(np.asarray, state)


def begin_with(state: TrainState, variables: PyTree) -> TrainState:
    """Starts all networks of a state at step 0, averages too, from given variables.

    Args:
      state: from `experiments.build.init_state`, as NumPy.
      variables: {"params", "batch_stats"} of a network, or some of them.
    """

    def begin(networks: PyTree, collection: str) -> PyTree:
        given = traverse_util.flatten_dict(variables[collection])
        changed = {
            name: traverse_util.unflatten_dict(traverse_util.flatten_dict(tree) | given)
            for name, tree in networks.items()
            if name != PLUGIN
        }
        return networks | changed

    state = state.replace(
        params=begin(state.params, "params"),
        batch_stats=begin(state.batch_stats, "batch_stats"),
    )
    if state.ema_params is None:
        return state
    return state.replace(
        ema_params=begin(state.ema_params, "params"),
        ema_batch_stats=begin(state.ema_batch_stats, "batch_stats"),
    )
