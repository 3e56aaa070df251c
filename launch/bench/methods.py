"""The steps of all methods, and what their passes come to, for `launch.bench`."""

import collections
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from launch.bench.step import TimedStep
from mpmc_jax.experiments.build import Setup, state_shape
from mpmc_jax.experiments.step_program import noise_setup, random_batch
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.train_step import make_keys
from mpmc_jax.types import Array, Batch, Network, PyTree

# A backward pass costs two forward ones: by the input and by the weights.
_STUDENT, _TEACHER = 3, 1


class _Counting:
    """A segmenter that notes how many images pass each of its halves."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.images: collections.Counter[str] = collections.Counter()

    def apply(self, variables: PyTree, *args: Any, method: Any, **kwargs: Any) -> Any:
        self.images[method.__name__] += len(jax.tree.leaves(args[0])[0])
        return self._module.apply(variables, *args, method=method, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def images_passed(
    config: ml_collections.ConfigDict, setup: Setup
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Images a step that pass "encode" and "decode": the teacher's and the student's.

    Args:
      config: of the run.
      setup: its parts, built without a device axis.
    """
    method = setup.step.method
    name = method.networks[0]
    teacher, student = (_Counting(setup.step.modules[name]) for _ in range(2))

    def trace(state: TrainState, batch: Batch) -> Array:
        keys = make_keys(setup.step, state, batch)
        inputs = method.augment(batch, state.method_state, keys)
        variables = state.params[name], state.batch_stats[name]
        teachers = {name: Network(teacher, *variables).frozen()}
        targets, _, moved = method.prepare(teachers, inputs, state.method_state)
        students = {name: Network(student, *variables, train=True)}
        outputs = method.views(students, teachers, inputs, targets, moved)
        return outputs.supervised[0].logits

    jax.eval_shape(trace, state_shape(setup), random_batch(config, setup))
    return teacher.images, student.images


def passes_flops(config: ml_collections.ConfigDict) -> float:
    """FLOPs of a step's passes: all but augmentation, losses and update."""
    setup = noise_setup(config, axis_name=None)
    cost = _flops_an_image(config, setup)
    teacher, student = images_passed(config, setup)
    return float(
        sum(
            cost[half] * (_TEACHER * teacher[half] + _STUDENT * student[half])
            for half in cost
        )
    )


def _flops_an_image(
    config: ml_collections.ConfigDict, setup: Setup
) -> dict[str, float]:
    """Of a forward pass through either half of the network."""
    name = setup.step.method.networks[0]
    state, crop = state_shape(setup), config.data.crop
    variables = state.params[name], state.batch_stats[name]
    image = jax.ShapeDtypeStruct((1, crop, crop, setup.model.in_channels), float)

    def network(variables: tuple[PyTree, PyTree]) -> Network:
        return Network(setup.step.modules[name], *variables)

    def encode(variables: tuple[PyTree, PyTree], image: Array) -> PyTree:
        return network(variables).encode(image)[0]

    def both(variables: tuple[PyTree, PyTree], image: Array) -> PyTree:
        return network(variables).decode(encode(variables, image))[0]

    def flops(function: Any) -> float:
        cost: Any = jax.jit(function).lower(variables, image).cost_analysis()
        return cost["flops"]

    of_encoder = flops(encode)
    return {"encode": of_encoder, "decode": flops(both) - of_encoder}


def bench_methods(
    configs: Mapping[str, ml_collections.ConfigDict], repeats: int
) -> dict[str, dict[str, Any]]:
    """Each method's step beside the mean teacher's, one after the other in turns.

    Returns:
      By method: the figures of its step, and its ratios: of time, of XLA's FLOPs, and
      of those that its own passes imply.
    """
    timed = {name: TimedStep(config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats + 1):
        for name, step in timed.items():
            times[name].append(step.seconds())
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}
    flops = {name: step.figures["flops"] for name, step in timed.items()}
    passes = {name: passes_flops(config) for name, config in configs.items()}
    return {
        name: {
            "step_seconds": seconds[name],
            **step.figures,
            "time_ratio": seconds[name] / seconds["mean_teacher"],
            "flops_ratio": flops[name] / flops["mean_teacher"],
            "passes_ratio": passes[name] / passes["mean_teacher"],
        }
        for name, step in timed.items()
    }
