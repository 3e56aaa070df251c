"""One optimizer step as a pure function of state and batch, on one device.

`parallel.py` maps it over devices. The step draws, asks the teacher for targets,
differentiates the student's views with the plug-in's terms, sums the gradients over
devices, updates, averages the teacher, and refuses itself if a number is not finite:
a loss term, the gradient, or anything in the state behind the update.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mpmc_jax import distributed
from mpmc_jax.random_keys import Keys
from mpmc_jax.training import gradient, objective
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.gradient import Carry, Values
from mpmc_jax.training.state import TrainState
from mpmc_jax.types import Array, Batch, PyTree


class StepInfo(struct.PyTreeNode):
    """What a process tells a step.

    Attributes:
      step: () int32, the step it takes this one for.
      stop: () bool, whether the process was asked to stop.
    """

    step: Array
    stop: Array


def make_step_info(step: int, stop: bool = False) -> StepInfo:
    """An order on the host."""
    return StepInfo(np.int32(step), np.bool_(stop))  # pyright: ignore


class Metrics(struct.PyTreeNode):
    """What a step reports; the same on every device.

    Attributes:
      values: name -> scalar; NaN for a mean over nothing, which is not written.
      shares: "label" and "pseudo" -> (c,) share of each class among the labels and
        among the confident pseudo-labels; NaN where there are none.
      refused: () int32, -1 if the update was made; else the index, in the order of
        `finite_names`, of the first number that was not finite, or their count if
        the batch was not the one the state waits for.
      stop: () bool, whether a process was asked to stop before it sent this step.
      requests: (groups,) int32 images for the step `Method.delay` later, or None.
      finite_names: what was checked, in order: loss terms, "grad_norm", and the parts
        of the updated state.
    """

    values: dict[str, Array]
    shares: dict[str, Array]
    refused: Array
    stop: Array
    requests: Array | None
    finite_names: tuple[str, ...] = struct.field(pytree_node=False)


def make_step(
    config: StepConfig,
) -> Callable[[TrainState, Batch, StepInfo], tuple[TrainState, Metrics]]:
    """The per-device step: (state, batch, order) -> (state, metrics).

    The update is made only if `order.step == state.step`: after a refusal every later
    batch is refused too, until the loop has seen it and stopped with that state.
    """

    def step(
        state: TrainState, batch: Batch, order: StepInfo
    ) -> tuple[TrainState, Metrics]:
        def augment(part: Batch) -> PyTree:
            keys = make_keys(config, state, part)
            return config.method.augment(part, state.method_state, keys)

        return apply(config, state, _split(batch, config.micro_batches), augment, order)

    return step


def apply(
    config: StepConfig,
    state: TrainState,
    parts: PyTree,
    augment: Callable[[PyTree], PyTree],
    order: StepInfo,
) -> tuple[TrainState, Metrics]:
    """The step behind its random draws.

    Args:
      parts: the micro-batches, stacked along a new first axis.
      augment: makes the inputs of one micro-batch.
    """
    totals = objective.Totals(
        config.axis_name,
        _counts(config, parts, augment),
        config.micro_batches,
    )
    carry = Carry(
        grads=jax.tree.map(jnp.zeros_like, state.params),
        batch_stats=state.batch_stats,
        teacher_stats=state.ema_batch_stats,
        method_state=state.method_state,
    )

    def one_part(carry: Carry, part: PyTree) -> tuple[Carry, Values]:
        return gradient.micro_batch(config, state, carry, augment(part), totals)

    if config.micro_batches == 1:
        carry, values = one_part(carry, jax.tree.map(lambda x: x[0], parts))
    else:
        carry, stacked = jax.lax.scan(one_part, carry, parts)
        values = jax.tree.map(lambda x: x.sum(0), stacked)
    return _update(config, state, carry, values, totals, order)


def make_keys(config: StepConfig, state: TrainState, batch: Batch) -> Keys:
    """The random keys of a micro-batch: of the step, its records and its groups."""
    record = batch.labeled.record
    groups = config.batch_size // config.group_size
    over = state.step // config.steps_per_epoch * config.steps_per_epoch
    return Keys(
        root=jax.random.wrap_key_data(state.key),
        step=state.step,
        record=record,
        group=record[:: config.group_size] % groups,
        progress=over / config.schedule.steps,
    )


def _split(batch: Batch, parts: int) -> Batch:
    """Rows -> (parts, rows / parts): whole groups stay together."""
    return jax.tree.map(lambda x: x.reshape((parts, -1) + x.shape[1:]), batch)


def _counts(
    config: StepConfig, parts: PyTree, augment: Callable[[PyTree], PyTree]
) -> dict[str, Array]:
    """Divisors known before any prediction, over the whole batch and all devices.

    What `augment` draws here it draws again in the micro-batch; only masks and boxes
    are needed, and the compiler drops the images.
    """

    def local(part: PyTree) -> dict[str, Array]:
        regions = config.method.regions(augment(part))
        counts = {name: region.valid.sum() for name, region in regions.items()}
        return {**counts, **config.plugin.counts(regions)}

    if config.micro_batches == 1:
        counts = local(jax.tree.map(lambda x: x[0], parts))
    else:
        stacked = jax.lax.map(local, parts)
        counts = jax.tree.map(lambda x: x.sum(0), stacked)
    return distributed.total(counts, config.axis_name)


def _update(
    config: StepConfig,
    state: TrainState,
    carry: Carry,
    values: Values,
    totals: objective.Totals,
    order: StepInfo,
) -> tuple[TrainState, Metrics]:
    asked = order.stop.astype(jnp.float32)
    grads, asked, means, classes = distributed.total(
        (carry.grads, asked, values.means, values.classes), config.axis_name
    )
    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params, ema_stats = _average(config, state, carry, params)
    moved = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=carry.batch_stats,
        ema_params=ema_params,
        ema_batch_stats=ema_stats,
        opt_state=opt_state,
        method_state=carry.method_state,
        key=state.key,
    )
    # The terms before their sum: the first that is broken is named.
    sums = {name: summed for name, (summed, _) in means.items()}
    checked = {k: v for k, v in (values.terms | sums).items() if k.startswith("loss_")}
    checked |= {"loss": values.terms["loss"], "grad_norm": optax.tree.norm(grads)}
    broken = ~jnp.isfinite(jnp.stack([checked[k].astype(jnp.float32) for k in checked]))
    is_finite = {key: _all_finite(tree) for key, tree in _parts(moved).items()}
    broken = jnp.concatenate([broken, ~jnp.stack([*is_finite.values()])])
    names = (*checked, *is_finite)
    late = order.step != state.step
    refused = jnp.where(
        broken.any(), jnp.argmax(broken), jnp.where(late, len(names), -1)
    )
    kept = jax.tree.map(lambda new, old: jnp.where(refused < 0, new, old), moved, state)
    shown = objective.counted_terms(values.terms, totals) | {
        "grad_norm": checked["grad_norm"],
        "lr": config.schedule(state.step),
    }
    shown |= {name: _mean(*pair) for name, pair in means.items()}
    delay, requests = config.method.delay, None
    if delay:
        requests = config.method.requested(kept.method_state, state.step + delay)
    refused = refused.astype(jnp.int32)
    shares = {kind: _mean(counts, counts.sum()) for kind, counts in classes.items()}
    return kept, Metrics(shown, shares, refused, asked > 0, requests, names)


def _parts(moved: TrainState) -> dict[str, PyTree]:
    """The parts of an updated state that may fail to be finite, by name.

    With finite gradients an update still overflows where the rate is too high, and a
    variance where activations are so large that batch norm takes them for zero. The
    momentum needs no look: the rate multiplies it into the parameters. Nor do averaged
    parameters, which lie between finite ones.

    Looking costs 26 bytes per parameter by XLA's count on a CPU (supervised; the
    updated values are read once more than written), and a pass over the method's own
    state (U2PL's bank of keys). DeepLabV3+ on a ResNet-50 has 40 million parameters:
    1.0 GB, where its UniMatch step at crop 321 with 2 + 2 images moves 73 GB.
    """
    return {
        "a number of the updated parameters": moved.params,
        "a number of batch norm's updated statistics": (
            moved.batch_stats,
            moved.ema_batch_stats,
        ),
        "a number of the method's updated state": moved.method_state,
    }


def _all_finite(tree: PyTree) -> Array:
    """Whether every floating-point number of a tree is finite: () bool."""
    leaves = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack(leaves).all() if leaves else jnp.array(True)


def _mean(summed: Array, count: Array) -> Array:
    """The quotient; NaN where nothing was counted."""
    return jnp.where(count > 0, summed / jnp.where(count > 0, count, 1), jnp.nan)


def _average(
    config: StepConfig, state: TrainState, carry: Carry, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The teacher after the step: parameters, and statistics unless it has its own."""
    decays = config.method.average(state.step, config.steps_per_epoch)
    if decays is None:
        return None, None

    def blend(decay: Array, old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(
            lambda o, n: (decay * o + (1 - decay) * n).astype(o.dtype), old, new
        )

    of_params, of_stats = decays
    ema_params = blend(of_params, state.ema_params, params)
    averaged = blend(
        of_params if of_stats is None else of_stats,
        state.ema_batch_stats,
        carry.batch_stats,
    )
    if of_stats is None:
        # The networks' own have moved; the plug-in's are always averaged.
        averaged |= {name: carry.teacher_stats[name] for name in config.modules}
    return ema_params, averaged
