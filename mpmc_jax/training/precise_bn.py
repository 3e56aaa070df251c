"""Precise batch norm: statistics counted anew before an evaluation.

Running statistics lag behind parameters that move fast, and follow every train-mode
pass, those over strong views alone included; both matter in short runs. Counted anew
they are the means over a few batches, all under the parameters of the moment (Wu and
Johnson, "Rethinking 'Batch' in BatchNorm", 2021), of the pass that the labelled images
are in, as the method composes it: with these statistics the network learned to predict
labels. Mean teacher's, AugSeg's and U2PL's is [labelled, mixed], UniMatch's [labelled,
weak], AEL's, supervision's and mean teacher's of `normalization` "apart" the labelled
images alone.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mpmc_jax.methods.base import Method
from mpmc_jax.models.layers import BATCH_NORM_MOMENTUM
from mpmc_jax.training import gradient
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import make_keys, split
from mpmc_jax.types import Batch, Network, PyTree


class FirstPass(Network):
    """A network whose statistics move in the first pass over each of its halves.

    Attributes:
      passed: the halves that were passed.
    """

    passed: tuple[str, ...] = struct.field(pytree_node=False, default=())

    def _apply(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Network]:
        out, moved = super()._apply(method, *args, **kwargs)
        if method in self.passed:
            return out, self
        return out, moved.replace(passed=(*self.passed, method))


def make_recount(
    parallel: Parallel,
    config: StepConfig,
    read: Callable[[], Iterable[Batch]],
    batches: int,
) -> Callable[[TrainState, str], TrainState]:
    """What replaces the statistics of the networks; the plug-in's stay.

    Args:
      parallel: the devices.
      config: whose networks and method; the method's phase of the state's last step
        composes the passes.
      read: gives `batches` placed batches, the same ones whenever it is called. They
        may lack partners that a method requests: the first pass sees none of them.
      batches: at least 1.

    Returns:
      (replicated state, "student" or "teacher") -> the state with that network's
      statistics: means over the batches of the mean and of the unbiased variance.
    """

    @functools.cache
    def adding(method: Method, prefix: str) -> Callable[..., PyTree]:
        def add(total: PyTree, batch: Batch, seen: tuple[TrainState, Any]) -> PyTree:
            state, number = seen
            if method.streams.partner == "requested":
                batch = batch.replace(partner=batch.unlabeled)
            # Each batch has draws of its own, the same ones in every recount.
            state = state.replace(step=number)
            params = getattr(state, f"{prefix}params")

            def one_part(part: Batch) -> PyTree:
                return _first_pass(config, method, state, params, part)

            parts = split(batch, config.micro_batches)
            if config.micro_batches == 1:
                counted = one_part(jax.tree.map(lambda x: x[0], parts))
            else:
                each = jax.lax.map(one_part, parts)
                counted = jax.tree.map(lambda x: x.mean(0), each)
            return jax.tree.map(lambda sum_, x: sum_ + x / batches, total, counted)

        return parallel.compile(add)

    def recount(state: TrainState, which: str) -> TrainState:
        prefix = "ema_" if which == "teacher" else ""
        stats = getattr(state, f"{prefix}batch_stats")
        last = max(int(parallel.fetch(state.step)) - 1, 0)
        method = config.method.phase(last // config.steps_per_epoch)
        old = parallel.fetch({name: stats[name] for name in config.modules})
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), old)
        total = parallel.replicate(zeros)
        seen = state.replace(opt_state=None)
        for number, batch in enumerate(read()):
            order = parallel.replicate(np.int32(number))
            total = adding(method, prefix)(total, batch, (seen, order))
        return state.replace(**{f"{prefix}batch_stats": {**stats, **total}})

    return recount


def _first_pass(
    config: StepConfig, method: Method, state: TrainState, params: PyTree, part: Batch
) -> PyTree:
    """The statistics of the labelled images' pass over a part of a batch, by network.

    What the method computes beside that pass the compiler drops.
    """
    inputs = method.augment(part, state.method_state, make_keys(config, state, part))
    teachers, _ = gradient.teaching(config, state)
    targets, _, method_state = method.prepare(teachers, inputs, state.method_state)
    # From zero a pass moves statistics by its own, times the momentum.
    zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
    students: dict[str, Network] = {
        name: FirstPass(module, params[name], zeros[name], train=True)
        for name, module in config.modules.items()
    }
    outputs = method.views(students, teachers, inputs, targets, method_state)
    stats = {name: network.batch_stats for name, network in outputs.students.items()}
    return jax.tree.map(lambda x: x / BATCH_NORM_MOMENTUM, stats)
