"""One training step as a pure function of state and batch, on one device.

`parallel.py` maps it over devices. Read `train_step` for what happens between two
states, and `micro_step` for what happens to one micro-batch: the teacher's targets, the
student's views, the plug-in, the objective and its gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mpmc_jax import distributed
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.models.platform import keep_layout
from mpmc_jax.random_keys import Keys
from mpmc_jax.training import objective, step_metrics
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.state import PLUGIN, TrainState, variables_of
from mpmc_jax.training.trees import (
    all_finite,
    norm,
    tree_where,
    with_joined_vectors,
)
from mpmc_jax.types import Array, Batch, Network, Outputs, PyTree


class StepInfo(struct.PyTreeNode):
    """Host inputs of a step besides the batch.

    Attributes:
      step: () int32, the number of the step that the batch is for.
      stop: () bool, whether the process was asked to stop.
    """

    step: Array
    stop: Array


def make_step_info(step: int, stop: bool = False) -> StepInfo:
    """Makes a `StepInfo` on the host."""
    return StepInfo(np.int32(step), np.bool_(stop))  # pyright: ignore


# The check that a batch is for the step of the state that it comes to.
IN_ORDER = "the order of batches"


class Metrics(struct.PyTreeNode):
    """What a step reports; the same on every device.

    Attributes:
      values: name -> scalar; NaN for a mean over nothing, which is not written.
      shares: "label" and "pseudo" -> (c,) share of each class among the labels and
        among the confident pseudo-labels; NaN where there are none.
      skipped: () bool, whether a check failed, so that the update was not made.
      failed: () int32, index in `checks` of the first check that failed, if one did.
      stop: () bool, whether a process was asked to stop before it sent this step.
      requests: (groups,) int32 images for the step `Method.delay` later, or None.
      checks: what was checked, in order. Loss terms, "grad_norm" and the trees of the
        updated state must be finite; `IN_ORDER` is that the batch is for the state's
        step.
    """

    values: dict[str, Array]
    shares: dict[str, Array]
    skipped: Array
    failed: Array
    stop: Array
    requests: Array | None
    checks: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def failed_check(self) -> str:
        """The name of the first check that failed; only if the update was skipped."""
        return self.checks[int(self.failed)]


class StepSums(struct.PyTreeNode):
    """Sums over a micro-batch; those of several micro-batches add up, field by field.

    Attributes:
      terms: this micro-batch's share of the batch's loss and of its terms, already
        summed over devices.
      pairs: metric -> (sum, count) of this device, of which the mean is reported.
      classes: "label" and "pseudo" -> (c,) pixels of this device by class.
    """

    terms: dict[str, Array]
    pairs: dict[str, tuple[Array, Array]]
    classes: dict[str, Array]


class Carry(struct.PyTreeNode):
    """What one micro-batch passes on to the next.

    Attributes:
      grads: sum of the gradients so far, of this device.
      batch_stats: the students' and the plug-in's running statistics.
      ema_batch_stats: the moving average's running statistics; in some methods its
        passes update them.
      method_state: the base method's own state.
    """

    grads: PyTree
    batch_stats: PyTree
    ema_batch_stats: PyTree
    method_state: PyTree


def make_step(
    config: StepConfig,
) -> Callable[[TrainState, Batch, StepInfo], tuple[TrainState, Metrics]]:
    """Makes the per-device step: (state, batch, info) -> (state, metrics).

    The update is made only if `info.step == state.step`. A skipped update leaves
    `state.step` as it was, so that later batches are skipped too, until the loop reads
    the failure and stops.
    """

    def step(
        state: TrainState, batch: Batch, info: StepInfo
    ) -> tuple[TrainState, Metrics]:
        def augment(micro_batch: Batch) -> PyTree:
            keys = make_keys(config, state, micro_batch)
            return config.method.augment(micro_batch, state.method_state, keys)

        # (b,...) -> (n,b/n,...) for n micro-batches: whole groups stay together.
        micro_batches = jax.tree.map(
            lambda x: x.reshape((config.micro_batches, -1) + x.shape[1:]), batch
        )
        return train_step(config, state, micro_batches, augment, info)

    return step


def train_step(
    config: StepConfig,
    state: TrainState,
    micro_batches: PyTree,
    augment: Callable[[PyTree], PyTree],
    info: StepInfo,
) -> tuple[TrainState, Metrics]:
    """Makes one update of the optimizer, unless a check fails (`Metrics.checks`).

    Args:
      config: the parts of the step.
      state: before the step.
      micro_batches: stacked along a new first axis.
      augment: makes the inputs of one micro-batch, with all random draws or their keys.
      info: what the process sent.
    """
    carry, sums, reduction = _accumulate(config, state, micro_batches, augment)
    # Gradients are summed: each loss is divided by the whole batch's count already.
    grads, stop, pairs, classes = distributed.total(
        (carry.grads, info.stop.astype(jnp.float32), sums.pairs, sums.classes),
        config.axis_name,
    )
    before = with_joined_vectors(state)  # the same numbers, read faster on GPUs
    updates, opt_state = config.optimizer.update(grads, before.opt_state, before.params)
    params = optax.apply_updates(before.params, updates)
    ema_params, ema_batch_stats = _update_average(config, before, carry, params)
    updated = TrainState(
        step=state.step + 1,
        params=params,
        batch_stats=carry.batch_stats,
        ema_params=ema_params,
        ema_batch_stats=ema_batch_stats,
        opt_state=opt_state,
        method_state=carry.method_state,
        key=state.key,
    )
    grad_norm = norm(grads)
    skipped, failed, checks = _check(
        sums.terms, pairs, grad_norm, updated, in_order=info.step == state.step
    )
    kept = tree_where(skipped, before, updated)
    delay, requests = config.method.delay, None
    if delay:
        requests = config.method.requested(kept.method_state, state.step + delay)
    values = {
        **step_metrics.uncounted_as_nan(sums.terms, reduction),
        "grad_norm": grad_norm,
        "lr": config.schedule(state.step),
        **{name: _mean(*pair) for name, pair in pairs.items()},
    }
    shares = {kind: _mean(counts, counts.sum()) for kind, counts in classes.items()}
    return kept, Metrics(
        values=values,
        shares=shares,
        skipped=skipped,
        failed=failed,
        stop=stop > 0,
        requests=requests,
        checks=checks,
    )


def _accumulate(
    config: StepConfig,
    state: TrainState,
    micro_batches: PyTree,
    augment: Callable[[PyTree], PyTree],
) -> tuple[Carry, StepSums, Reduction]:
    """Sums gradients and metrics over micro-batches.

    The `Reduction` that it also returns holds the divisors of the whole batch.
    """
    carry = Carry(
        grads=jax.tree.map(jnp.zeros_like, state.params),
        batch_stats=state.batch_stats,
        ema_batch_stats=state.ema_batch_stats,
        method_state=state.method_state,
    )
    if config.micro_batches == 1:
        inputs = augment(jax.tree.map(lambda x: x[0], micro_batches))
        reduction = _make_reduction(config, _count(config, inputs))
        return *micro_step(config, state, carry, inputs, reduction), reduction
    # The divisors of the whole batch come first. `augment` draws the same again in the
    # scan; only masks are needed here, and XLA drops the images.
    counts = jax.lax.map(lambda one: _count(config, augment(one)), micro_batches)
    reduction = _make_reduction(config, jax.tree.map(lambda x: x.sum(0), counts))

    def body(carry: Carry, micro_batch: PyTree) -> tuple[Carry, StepSums]:
        return micro_step(config, state, carry, augment(micro_batch), reduction)

    carry, stacked = jax.lax.scan(body, carry, micro_batches)
    return carry, jax.tree.map(lambda x: x.sum(0), stacked), reduction


def micro_step(
    config: StepConfig,
    state: TrainState,
    carry: Carry,
    inputs: PyTree,
    reduction: Reduction,
) -> tuple[Carry, StepSums]:
    """Adds the gradient of one micro-batch to the carry; also returns its sums."""
    method = config.method
    # Statistics are updated from micro-batch to micro-batch. `keep_layout` changes no
    # number: it keeps XLA from reordering parameters in memory on GPUs.
    now = state.replace(
        params=keep_layout(state.params),
        ema_params=keep_layout(state.ema_params),
        batch_stats=carry.batch_stats,
        ema_batch_stats=carry.ema_batch_stats,
    )
    teachers, teacher_plugin_variables = select_teachers(config, now)
    targets, teacher_stats, prepared_state = jax.lax.stop_gradient(
        method.prepare(teachers, inputs, carry.method_state)
    )

    def loss_fn(params: PyTree):
        students = {
            name: Network(module, params[name], carry.batch_stats[name], train=True)
            for name, module in config.modules.items()
        }
        outputs = method.views(students, teachers, inputs, targets, prepared_state)
        student_plugin_variables = variables_of(
            now.replace(params=params), PLUGIN, averaged=False
        )
        loss, sums, plugin_stats = _objective(
            config,
            state.step,
            student_plugin_variables,
            teacher_plugin_variables,
            outputs,
            reduction,
        )
        stats = {name: net.batch_stats for name, net in outputs.students.items()}
        if PLUGIN in params:
            stats[PLUGIN] = plugin_stats
        return loss, (sums, stats, outputs.state)

    grads, (sums, stats, method_state) = jax.grad(loss_fn, has_aux=True)(now.params)
    ema_batch_stats = carry.ema_batch_stats
    if teacher_stats:
        ema_batch_stats = {**ema_batch_stats, **teacher_stats}
    carry = Carry(
        grads=jax.tree.map(jnp.add, carry.grads, keep_layout(grads)),
        batch_stats=stats,
        ema_batch_stats=ema_batch_stats,
        method_state=method_state,
    )
    return carry, sums


def make_keys(config: StepConfig, state: TrainState, batch: Batch) -> Keys:
    """Makes the random keys of a micro-batch, of its step, examples and groups."""
    example = batch.labeled.batch_index
    groups = config.batch_size // config.group_size
    finished_steps = state.step // config.steps_per_epoch * config.steps_per_epoch
    return Keys(
        root=jax.random.wrap_key_data(state.key),
        step=state.step,
        example=example,
        # Example i is of group i mod G, and a group's examples are adjacent here, see
        # `parallel`.
        group=example[:: config.group_size] % groups,
        progress=finished_steps / config.schedule.steps,
    )


def select_teachers(
    config: StepConfig, state: TrainState
) -> tuple[dict[str, Network], dict[str, PyTree]]:
    """Returns the networks that make targets, and the plug-in's variables for `refine`.

    Both are the students' own or their moving averages, as `Method.teacher` and
    `Plugin.teacher_head` say. Analysis calls this too, so that its lambda is the one of
    training.
    """
    averaged = config.method.teacher == "average"
    teachers = {
        name: Network(module, **variables_of(state, name, averaged=averaged)).frozen()
        for name, module in config.teacher_modules.items()
    }
    plugin_variables = variables_of(
        state, PLUGIN, averaged=config.plugin.teacher_head == "ema"
    )
    return teachers, jax.lax.stop_gradient(plugin_variables)


def _objective(
    config: StepConfig,
    step: Array,
    student_plugin_variables: PyTree,
    teacher_plugin_variables: PyTree,
    outputs: Outputs,
    reduction: Reduction,
) -> tuple[Array, StepSums, PyTree]:
    """Computes the total loss, all sums and the plug-in's updated statistics."""
    plugin, scale = config.plugin, config.method.scale
    active = None
    if plugin.warmup_epochs:
        active = step >= plugin.warmup_epochs * config.steps_per_epoch
    views, plugin_targets = plugin.refine(
        teacher_plugin_variables, outputs.views, reduction, active
    )
    added = plugin.losses(
        student_plugin_variables,
        outputs.supervised,
        views,
        plugin_targets,
        reduction,
    )
    alpha = config.alpha_at(step)
    loss, terms = objective.combine(
        outputs,
        views,
        added.terms,
        reduction,
        config.supervised_loss,
        scale=scale,
        alpha=alpha,
    )
    pairs = {
        **outputs.metrics,
        **added.metrics,
        **step_metrics.view_metrics(outputs.views, views, scale=scale, alpha=alpha),
    }
    sums = StepSums(
        terms={"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}},
        pairs={
            name: (jnp.asarray(value, float), jnp.asarray(count, float))
            for name, (value, count) in pairs.items()
        },
        classes={
            kind: counts.astype(float)
            for kind, counts in step_metrics.class_pixels(outputs).items()
        },
    )
    return loss, sums, added.batch_stats


def _count(config: StepConfig, inputs: PyTree) -> dict[str, Array]:
    """Counts this device's part of the divisors that need no prediction."""
    regions = config.method.regions(inputs)
    counts = {name: region.valid.sum() for name, region in regions.items()}
    return {**counts, **config.plugin.counts(regions)}


def _make_reduction(config: StepConfig, counts: dict[str, Array]) -> Reduction:
    """Makes the reduction of a batch from this device's counts."""
    everywhere = distributed.total(counts, config.axis_name)
    return Reduction(config.axis_name, everywhere, config.micro_batches)


def _update_average(
    config: StepConfig, state: TrainState, carry: Carry, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the moving averages of parameters and batch-norm statistics after a step.

    Where `average_decays` returns (decay, None), the teacher's own passes update the
    batch-norm statistics of its networks: those that the passes of this step left in
    the carry are kept, and not averaged with the students'.
    """
    decays = config.method.average_decays(state.step, config.steps_per_epoch)
    if decays is None:
        return None, None

    def blend(decay: Array, old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(
            lambda o, n: (decay * o + (1 - decay) * n).astype(o.dtype), old, new
        )

    params_decay, stats_decay = decays
    ema_params = blend(params_decay, state.ema_params, params)
    ema_batch_stats = blend(
        params_decay if stats_decay is None else stats_decay,
        state.ema_batch_stats,
        carry.batch_stats,
    )
    if stats_decay is None:
        # Keep what the teacher's passes updated; only the plug-in's are averaged.
        kept = {name: carry.ema_batch_stats[name] for name in config.modules}
        ema_batch_stats = ema_batch_stats | kept
    return ema_params, ema_batch_stats


def _check(
    terms: dict[str, Array],
    pairs: dict[str, tuple[Array, Array]],
    grad_norm: Array,
    updated: TrainState,
    *,
    in_order: Array,
) -> tuple[Array, Array, tuple[str, ...]]:
    """Returns `skipped`, `failed` and `checks` of `Metrics`.

    Args:
      terms: the loss and its terms.
      pairs: metric -> (sum, count); those of losses are checked.
      grad_norm: norm of the summed gradient.
      updated: the state after the update.
      in_order: () bool, whether the batch is for the state's step.
    """
    sums = {name: summed for name, (summed, _) in pairs.items()}
    # The terms come before their sum, so that the first one that is not finite is
    # named.
    checked = {k: v for k, v in (terms | sums).items() if k.startswith("loss_")}
    checked |= {"loss": terms["loss"], "grad_norm": grad_norm}
    numbers = jnp.stack([value.astype(jnp.float32) for value in checked.values()])
    trees = _checked_trees(updated)
    passed = jnp.stack([*map(all_finite, trees.values()), in_order])
    failed = ~jnp.concatenate([jnp.isfinite(numbers), passed])
    first = jnp.argmax(failed).astype(jnp.int32)
    return failed.any(), first, (*checked, *trees, IN_ORDER)


def _checked_trees(updated: TrainState) -> dict[str, PyTree]:
    """Returns the trees of an updated state that may not be finite, by name.

    With finite gradients an update still overflows where the rate is too high, and so
    does a variance where activations are so large that batch norm makes them zero. The
    momentum need not be checked: the rate multiplies it into the parameters. Nor need
    averaged parameters be checked, which lie between finite ones.

    Checking the state moves 26 bytes per parameter (XLA's count of a supervised step on
    a CPU), and reads the method's own state once (U2PL's bank of keys). DeepLabV3+ on a
    ResNet-50 has 40 million parameters: 1.0 GB, where its UniMatch step at crop 321
    with 2 + 2 images moves 73 GB.
    """
    return {
        "an updated parameter": updated.params,
        "an updated batch-norm statistic": (
            updated.batch_stats,
            updated.ema_batch_stats,
        ),
        "a value of the method's updated state": updated.method_state,
    }


def _mean(summed: Array, count: Array) -> Array:
    """Divides a sum by its count; NaN where nothing was counted."""
    return jnp.where(count > 0, summed / jnp.where(count > 0, count, 1), jnp.nan)
