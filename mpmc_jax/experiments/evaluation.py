"""Builds the evaluation of a run: protocol, evaluated network, patch classifier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections

from mpmc_jax.data.build import build_eval
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.evaluation.evaluator import Evaluator, PatchProbe
from mpmc_jax.evaluation.protocols import EvalProtocol, build_protocol
from mpmc_jax.experiments.build import Setup, averages
from mpmc_jax.training.state import TrainState, variables_of
from mpmc_jax.training.train_step import select_teachers
from mpmc_jax.types import IGNORE_LABEL, Array, Network, PyTree


def make_protocol(config: ml_collections.ConfigDict) -> EvalProtocol:
    """Builds the protocol that `config.eval` names, with windows as large as the crop.

    Raises:
      ValueError: see `build_protocol`.
    """
    settings = config.eval
    return build_protocol(
        settings.protocol, config.data.crop, tuple(settings.scales), settings.flip
    )


def make_evaluator(
    config: ml_collections.ConfigDict, module: Any, facts: DatasetFacts
) -> Evaluator:
    """Builds the evaluator that `config.eval` describes.

    Raises:
      ValueError: see `make_protocol` and `Evaluator`.
    """
    return Evaluator(
        module,
        facts.num_classes,
        pixels=facts.pixels,
        batch_size=config.eval.batch_size,
        pad_to=config.eval.pad_to,
        protocol=make_protocol(config),
    )


def best_metric(config: ml_collections.ConfigDict) -> str:
    """Returns the metric that `eval.best_metric` names; "auto" is the protocol's."""
    chosen = config.eval.best_metric
    return make_protocol(config).metric if chosen == "auto" else chosen


def checked_best_metric(
    config: ml_collections.ConfigDict, setup: Setup, facts: DatasetFacts
) -> str:
    """Returns `best_metric`, if validation computes such a metric.

    Raises:
      ValueError: there is no such metric, or it is of a class that no validation image
        has.
    """
    chosen, protocol = best_metric(config), make_protocol(config)
    if config.eval.best_metric == "auto":
        return chosen
    names, kinds = ["miou", "pixel_accuracy"], {"iou": facts.class_names}
    if protocol.by_volume:
        names, kinds = [*names, "dice"], {**kinds, "dice": facts.class_names[1:]}
    if setup.step.plugin.classifies_patches:
        names += ["patch_map", "patch_hamming"]
    names += [f"{kind}/{name}" for kind, known in kinds.items() for name in known]
    if chosen not in names:
        raise ValueError(
            f"eval.best_metric={chosen!r} is unknown; valid: auto, {', '.join(names)}"
        )
    _, _, of_class = chosen.partition("/")
    info = build_eval(config, "val").info
    present = {i for key in info.ids["val"] for i in info.present.get(key, ())}
    if of_class and facts.class_names.index(of_class) not in present:
        raise ValueError(
            f"eval.best_metric={chosen!r}: no validation image has the class "
            f"{of_class!r}; choose another metric"
        )
    return chosen


class EvaluatedNetwork(NamedTuple):
    """The network that is evaluated: a student, or a student's moving average."""

    student: str
    averaged: bool

    @property
    def name(self) -> str:
        """The name in `eval.network` and in result files."""
        return "teacher" if self.averaged else self.student


def check_network(config: ml_collections.ConfigDict, setup: Setup) -> None:
    """Checks that the run has the network that `eval.network` names.

    Raises:
      ValueError: an unknown name, or "teacher" although the method averages none.
    """
    choice = config.eval.network
    valid = ["auto", *setup.step.method.networks, "teacher"]
    if choice not in valid:
        raise ValueError(f"eval.network={choice!r} is unknown; valid: {valid}")
    if choice == "teacher" and not averages(setup.step.method):
        raise ValueError(
            f"eval.network='teacher', but method.name={config.method.name!r} keeps no "
            "average; use 'auto' or set method.ema_decay"
        )


def evaluated_network(
    config: ml_collections.ConfigDict, setup: Setup, state: TrainState
) -> EvaluatedNetwork:
    """Returns which network is evaluated; see `check_network` for valid names.

    eval.network=teacher is the average of the method's first network. "auto" is that
    average where the method keeps one, but the first network itself during a warm-up;
    the phase of the state's last step decides.
    """
    choice, first = config.eval.network, setup.step.method.networks[0]
    if choice == "auto":
        last = max(int(state.step) - 1, 0)
        phase = setup.step.method.phase(last // setup.step.steps_per_epoch)
        averaged = state.ema_params is not None and phase.evaluated == "average"
        return EvaluatedNetwork(first, averaged)
    averaged = choice == "teacher"
    return EvaluatedNetwork(first if averaged else choice, averaged)


def make_probe_builder(setup: Setup) -> Callable[[TrainState], PatchProbe | None]:
    """Returns the function from a state to its patch classifier, None without one.

    The patch classifier is the one that weighs pseudo-labels in training (row D24 of
    docs/deviations.md): head and taps of the network that makes the targets, whatever
    network is evaluated. All probes share one function, and so its compiled programs.
    """
    plugin = setup.step.plugin
    if not plugin.classifies_patches:
        return lambda state: None
    network = setup.step.method.networks[0]
    module = setup.step.teacher_modules[network]

    def apply(variables: PyTree, images: Array, labels: Array):
        # Only whole patches of the encoder are classified; a smaller image is one.
        padding = [(0, max(module.multiple - side, 0)) for side in labels.shape[1:3]]
        images = jnp.pad(images, ((0, 0), *padding, (0, 0)), mode="edge")
        labels = jnp.pad(labels, ((0, 0), *padding), constant_values=IGNORE_LABEL)
        rows, columns = (side - side % module.multiple for side in labels.shape[1:3])
        images, labels = images[:, :rows, :columns], labels[:, :rows, :columns]
        teacher = Network(module, **variables["network"])
        return plugin.classify_patches(teacher, variables["head"], images, labels)

    def build(state: TrainState) -> PatchProbe:
        teachers, head = select_teachers(setup.step, state)
        teacher = teachers[network]
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        both = {"network": variables, "head": head}
        return PatchProbe(both, apply, module.multiple)

    return build


def make_validation(
    config: ml_collections.ConfigDict, setup: Setup, facts: DatasetFacts
) -> Callable[[TrainState], dict[str, float]]:
    """Returns the function that evaluates a state on the validation split.

    It takes one copy of the state and returns scores by name, such as `val/miou`.

    Raises:
      ValueError: `eval.network` names a network that the run does not have.
    """
    check_network(config, setup)
    dataset = build_eval(config, "val")
    # All networks of a method have the same module, and so the same programs.
    module = setup.step.modules[setup.step.method.networks[0]]
    evaluator = make_evaluator(config, module, facts)
    evaluator.check(dataset)
    probe = make_probe_builder(setup)

    def validate(state: TrainState) -> dict[str, float]:
        network = evaluated_network(config, setup, state)
        variables = variables_of(state, network.student, averaged=network.averaged)
        result = evaluator.run(variables, dataset, probe(state))
        scalars = result.scalars(facts.class_names)
        scalars["pad_to"] = result.pad_to
        return {f"val/{name}": value for name, value in scalars.items()}

    return validate
