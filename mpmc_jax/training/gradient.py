"""The differentiated part of a step: one micro-batch's losses and gradients.

The teacher makes targets, the student makes views, the plug-in refines them and adds
its terms; the gradient of the whole objective is added to what came before.
"""

import jax
import jax.numpy as jnp
from flax import struct

from mpmc_jax.training import objective
from mpmc_jax.training.config import StepConfig
from mpmc_jax.training.state import PLUGIN, TrainState, select
from mpmc_jax.types import Array, Network, Outputs, PyTree


class Values(struct.PyTreeNode):
    """The numbers of a micro-batch; those of several add up, field by field.

    Attributes:
      terms: the loss and its terms: this part's share of the whole batch's, the same
        on every device.
      means: name -> (sum, count) of this device.
      classes: "label" and "pseudo" -> (c,) pixels of this device by class.
    """

    terms: dict[str, Array]
    means: dict[str, tuple[Array, Array]]
    classes: dict[str, Array]


class Carry(struct.PyTreeNode):
    """What moves from micro-batch to micro-batch."""

    grads: PyTree
    batch_stats: PyTree
    teacher_stats: PyTree
    method_state: PyTree


def teaching(
    config: StepConfig, state: TrainState
) -> tuple[dict[str, Network], dict[str, PyTree]]:
    """What makes targets: the frozen teachers by name, and the plug-in's head.

    The average's or the student's, each as the method and the plug-in say. Analysis
    asks here as well: its lambda is the one that training uses.
    """
    averaged = config.method.teacher == "average"
    teachers = {
        name: Network(module, **select(state, name, averaged=averaged)).frozen()
        for name, module in config.teachers.items()
    }
    head = select(state, PLUGIN, averaged=config.plugin.teacher_head == "ema")
    return teachers, jax.lax.stop_gradient(head)


def micro_batch(
    config: StepConfig,
    state: TrainState,
    carry: Carry,
    inputs: PyTree,
    totals: objective.Totals,
) -> tuple[Carry, Values]:
    """Adds one micro-batch's gradient to the carry; also returns its numbers."""
    method = config.method
    # Statistics move from part to part.
    now = state.replace(
        batch_stats=carry.batch_stats, ema_batch_stats=carry.teacher_stats
    )
    teachers, teacher_head = teaching(config, now)
    targets, moved, method_state = jax.lax.stop_gradient(
        method.prepare(teachers, inputs, carry.method_state)
    )

    def loss_fn(params: PyTree):
        students = {
            name: Network(module, params[name], carry.batch_stats[name], train=True)
            for name, module in config.modules.items()
        }
        outputs = method.views(students, teachers, inputs, targets, method_state)
        loss, values, head_stats = _objective(
            config, now.replace(params=params), teacher_head, outputs, totals
        )
        stats = {name: net.batch_stats for name, net in outputs.students.items()}
        if PLUGIN in params:
            stats[PLUGIN] = head_stats
        return loss, (values, stats, outputs.state)

    grads, (values, stats, method_state) = jax.grad(loss_fn, has_aux=True)(state.params)
    teacher_stats = carry.teacher_stats
    if moved:
        teacher_stats = {**teacher_stats, **moved}
    carry = Carry(
        grads=jax.tree.map(jnp.add, carry.grads, grads),
        batch_stats=stats,
        teacher_stats=teacher_stats,
        method_state=method_state,
    )
    return carry, values


def _objective(
    config: StepConfig,
    state: TrainState,
    teacher_head: PyTree,
    outputs: Outputs,
    totals: objective.Totals,
) -> tuple[Array, Values, PyTree]:
    """Total loss, all numbers by name, and the plug-in's moved statistics."""
    plugin = config.plugin
    active = None
    if plugin.warmup_epochs:
        active = state.step >= plugin.warmup_epochs * config.steps_per_epoch
    head = select(state, PLUGIN, averaged=False)
    views, targets = plugin.refine(
        teacher_head, outputs.views, total=totals.sum, active=active
    )
    terms, metrics, head_stats = plugin.losses(
        head,
        outputs.supervised,
        views,
        targets,
        totals.counts,
        total=totals.sum,
        active=active,
    )
    loss, terms_of_method = objective.combine(
        outputs,
        views,
        terms,
        totals,
        config.supervised_loss,
        scale=config.method.scale,
        alpha=config.alpha(state.step),
    )
    metrics = metrics | objective.view_metrics(
        outputs.views,
        views,
        scale=config.method.scale,
        alpha=config.alpha(state.step),
    )
    values = Values(
        terms={"loss": loss, **{f"loss_{k}": v for k, v in terms_of_method.items()}},
        means={
            name: (jnp.asarray(value, float), jnp.asarray(count, float))
            for name, (value, count) in (outputs.metrics | metrics).items()
        },
        classes={
            kind: counts.astype(float)
            for kind, counts in objective.classes_seen(outputs).items()
        },
    )
    return loss, values, head_stats
