"""One optimiser step as a pure function of state and batch, on one device.

`parallel.py` maps it over devices. The step draws, asks the teacher for targets,
differentiates the student's views with the plug-in's terms, sums the gradients over
devices, updates, averages the teacher, and refuses itself if a number is not finite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mpmc_jax.methods.base import Method
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.training import objective
from mpmc_jax.training.optimizer import Schedule
from mpmc_jax.training.state import PLUGIN, TrainState
from mpmc_jax.types import Array, Batch, Inputs, Keys, Network, PyTree

AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The parts of a step.

    Attributes:
      method, plugin: the base method and what refines it.
      modules: segmenter by network name.
      optimizer, schedule: update rule, and the rate it follows (for the metrics).
      supervised_loss: L_x.
      batch_size: labelled images a step over all devices.
      group_size: images that rank, mix and draw among themselves.
      micro_batches: parts worked off one after the other.
      steps_per_epoch: length of an epoch.
      axis_name: the mapped axis, None on a single device without mapping.
    """

    method: Method
    plugin: Plugin
    modules: dict[str, Any]
    optimizer: optax.GradientTransformation
    schedule: Schedule
    supervised_loss: objective.SupervisedLoss
    batch_size: int
    group_size: int
    micro_batches: int
    steps_per_epoch: int
    axis_name: str | None = AXIS


@struct.dataclass
class Metrics:
    """What a step reports; the same on every device.

    Attributes:
      values: name -> scalar.
      refused: () int32, -1 if the update was made; else the index, in the order of
        `finite_names`, of the first number that was not finite, or their count if
        the batch was not the one the state waits for.
      finite_names: names of the checked numbers.
    """

    values: dict[str, Array]
    refused: Array
    finite_names: tuple[str, ...] = struct.field(pytree_node=False)


@struct.dataclass
class _Carry:
    """What moves from micro-batch to micro-batch."""

    grads: PyTree
    batch_stats: PyTree
    teacher_stats: PyTree
    method_state: PyTree


def make_step(
    config: StepConfig,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """The per-device step: (state, batch, expected step) -> (state, metrics).

    The update is made only if `expected == state.step`: after a refusal every later
    batch is refused too, until the loop has seen it and stopped with that state.
    """

    def step(
        state: TrainState, batch: Batch, expected: Array
    ) -> tuple[TrainState, Metrics]:
        def augment(part: Batch) -> Inputs:
            keys = _keys(config, state, part)
            return config.method.augment(part, state.method_state, keys)

        return apply(config, state, _split(batch, config.micro_batches), augment, expected)

    return step


def apply(
    config: StepConfig,
    state: TrainState,
    parts: PyTree,
    augment: Callable[[PyTree], Inputs],
    expected: Array,
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
    carry = _Carry(
        grads=jax.tree.map(jnp.zeros_like, state.params),
        batch_stats=state.batch_stats,
        teacher_stats=state.ema_batch_stats,
        method_state=state.method_state,
    )

    def micro_batch(carry: _Carry, part: PyTree) -> tuple[_Carry, dict[str, Array]]:
        return _micro_batch(config, state, carry, augment(part), totals)

    if config.micro_batches == 1:
        carry, values = micro_batch(carry, jax.tree.map(lambda x: x[0], parts))
    else:
        carry, stacked = jax.lax.scan(micro_batch, carry, parts)
        values = jax.tree.map(lambda x: x.sum(0), stacked)
    return _update(config, state, carry, values, expected)


def _keys(config: StepConfig, state: TrainState, batch: Batch) -> Keys:
    record = batch.labeled.record
    groups = config.batch_size // config.group_size
    return Keys(
        root=state.key,
        step=state.step,
        record=record,
        group=record[:: config.group_size] % groups,
    )


def _split(batch: Batch, parts: int) -> Batch:
    """Rows -> (parts, rows / parts): whole groups stay together."""
    return jax.tree.map(lambda x: x.reshape((parts, -1) + x.shape[1:]), batch)


def _counts(
    config: StepConfig, parts: PyTree, augment: Callable[[PyTree], Inputs]
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
    if config.axis_name is None:
        return counts
    return jax.lax.psum(counts, config.axis_name)


def _networks(
    config: StepConfig, params: PyTree, batch_stats: PyTree, *, train: bool
) -> dict[str, Network]:
    return {
        name: Network(module, params[name], batch_stats[name], train)
        for name, module in config.modules.items()
    }


def _teachers(config: StepConfig, state: TrainState, carry: _Carry):
    if config.method.teacher == "average":
        params, stats = state.ema_params, carry.teacher_stats
    else:
        params, stats = state.params, carry.batch_stats
    networks = _networks(config, params, stats, train=False)
    return {name: network.frozen() for name, network in networks.items()}


def _plugin_variables(params: PyTree, batch_stats: PyTree) -> PyTree:
    if PLUGIN not in params:
        return {}
    return {"params": params[PLUGIN], "batch_stats": batch_stats[PLUGIN]}


def _micro_batch(
    config: StepConfig,
    state: TrainState,
    carry: _Carry,
    inputs: Inputs,
    totals: objective.Totals,
) -> tuple[_Carry, dict[str, Array]]:
    method, plugin = config.method, config.plugin
    teachers = _teachers(config, state, carry)
    targets, moved, method_state = jax.lax.stop_gradient(
        method.prepare(teachers, inputs, carry.method_state)
    )
    active = None
    if plugin.warmup_epochs:
        active = state.step >= plugin.warmup_epochs * config.steps_per_epoch

    def loss_fn(params: PyTree):
        students = _networks(config, params, carry.batch_stats, train=True)
        outputs = method.views(students, teachers, inputs, targets, method_state)
        head = _plugin_variables(params, carry.batch_stats)
        teacher_head = jax.lax.stop_gradient(head)
        if plugin.teacher_head == "ema":
            teacher_head = _plugin_variables(state.ema_params, carry.teacher_stats)
        views, plugin_targets = plugin.refine(
            teacher_head, outputs.views, total=totals.sum, active=active
        )
        terms, plugin_metrics, plugin_stats = plugin.losses(
            head,
            outputs.supervised,
            views,
            plugin_targets,
            totals.counts,
            total=totals.sum,
            active=active,
        )
        loss, values = objective.combine(
            outputs,
            views,
            terms,
            totals,
            config.supervised_loss,
            scale=method.scale,
            alpha=plugin.alpha,
        )
        stats = {name: net.batch_stats for name, net in outputs.students.items()}
        if head:
            stats[PLUGIN] = plugin_stats
        values = {"loss": loss, **{f"loss_{k}": v for k, v in values.items()}}
        shares = _shares(outputs.metrics | plugin_metrics, totals)
        return loss, (values | shares, stats, outputs.state)

    grads, (values, stats, method_state) = jax.grad(loss_fn, has_aux=True)(state.params)
    teacher_stats = carry.teacher_stats
    if moved:
        teacher_stats = {**teacher_stats, **moved}
    carry = _Carry(
        grads=jax.tree.map(jnp.add, carry.grads, grads),
        batch_stats=stats,
        teacher_stats=teacher_stats,
        method_state=method_state,
    )
    return carry, values


def _shares(
    pairs: dict[str, tuple[Array, Array]], totals: objective.Totals
) -> dict[str, Array]:
    """(sum, count) of each metric -> its mean over devices, for the micro-batch."""
    return {
        name: totals.local_mean(jnp.asarray(value, float), jnp.asarray(count))
        for name, (value, count) in pairs.items()
    }


def _update(
    config: StepConfig,
    state: TrainState,
    carry: _Carry,
    values: dict[str, Array],
    expected: Array,
) -> tuple[TrainState, Metrics]:
    grads = carry.grads
    if config.axis_name is not None:
        grads = jax.lax.psum(grads, config.axis_name)
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
    checked = {k: v for k, v in values.items() if k.startswith("loss")}
    checked["grad_norm"] = optax.tree.norm(grads)
    broken = ~jnp.isfinite(jnp.stack([checked[k].astype(jnp.float32) for k in checked]))
    late = expected != state.step
    refused = jnp.where(broken.any(), jnp.argmax(broken), jnp.where(late, len(checked), -1))
    kept = jax.tree.map(
        lambda new, old: jnp.where(refused < 0, new, old),
        moved.replace(key=None),
        state.replace(key=None),
    ).replace(key=state.key)
    values = values | {
        "grad_norm": checked["grad_norm"],
        "lr": config.schedule(state.step),
    }
    if "lambda_mean" in values:
        # What alpha comes to after lambda_s.
        values["unlabeled_weight"] = config.plugin.alpha * values["lambda_mean"]
    return kept, Metrics(values, refused.astype(jnp.int32), tuple(checked))


def _average(
    config: StepConfig, state: TrainState, carry: _Carry, params: PyTree
) -> tuple[PyTree, PyTree]:
    """The teacher after the step: parameters, and statistics unless it has its own."""
    decays = config.method.average(state.step, state.step // config.steps_per_epoch)
    if decays is None:
        return None, None

    def blend(decay: Array, old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(
            lambda o, n: (decay * o + (1 - decay) * n).astype(o.dtype), old, new
        )

    of_params, of_stats = decays
    ema_params = blend(of_params, state.ema_params, params)
    if of_stats is None:
        return ema_params, carry.teacher_stats
    return ema_params, blend(of_stats, state.ema_batch_stats, carry.batch_stats)
