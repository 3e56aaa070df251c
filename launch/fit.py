"""Finds the batch, accumulation and rematerialization that fit the devices of a run.

Each candidate's step is compiled, and XLA's count of its memory compared with what a
device has; nothing is allocated. The one that is chosen makes two steps on noise, which
give the run's hours.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections

from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.experiments import config_checks
from mpmc_jax.experiments.build import (
    Setup,
    build_base,
    build_parallel,
    build_setup,
    init_state,
    total_steps,
)
from mpmc_jax.experiments.step_program import lower_step, peak_bytes, random_batch
from mpmc_jax.experiments.train import prepare
from mpmc_jax.methods.registry import group_weights
from mpmc_jax.models.rematerialization import REMATS
from mpmc_jax.text import quantity
from mpmc_jax.training.metric_writer import duration
from mpmc_jax.training.train_step import make_step_info
from mpmc_jax.training.workdir import flatten

# How many times larger batches are tried, if the configured one fits at once.
_LARGER = (8, 4, 2)


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of a candidate, and what it takes on each device.

    Attributes:
      peak: bytes at once.
      fixed: bytes of them that do not depend on the batch, about.
      run: the compiled step.
      setup: the parts that it was made of.
    """

    peak: int
    fixed: int
    run: Any = None
    setup: Any = None

    def peak_at(self, ratio: float) -> float:
        """Estimates the peak with `ratio` times as many images at once."""
        return self.fixed + (self.peak - self.fixed) * ratio


Compile = Callable[[ml_collections.ConfigDict], Program]


def scaled(
    config: ml_collections.ConfigDict, batch: int, accumulation: int, remat: str
) -> ml_collections.ConfigDict:
    """Returns a configuration with another batch and the learning rate that goes with.

    The rate grows in proportion to the batch with SGD (Goyal et al., 2017), and with
    its square root with AdamW (Malladi et al., NeurIPS 2022). Weights of losses stay as
    they are, also those that by default fall with the number of groups.
    """
    made = config.copy_and_resolve_references()
    if batch != config.train.batch_size:
        made.update_from_flattened_dict(group_weights(config))
    ratio = batch / config.train.batch_size
    made.optimizer.lr *= ratio if config.optimizer.name == "sgd" else math.sqrt(ratio)
    made.train.batch_size, made.train.accumulation = batch, accumulation
    made.model.remat = remat
    return made


def candidates(
    config: ml_collections.ConfigDict, devices: int, remats: Sequence[str] = REMATS
) -> Iterator[ml_collections.ConfigDict]:
    """Yields what to try, the best first.

    The batch is the configured one, or the next larger one whose groups divide over the
    devices. Rematerialization comes first, because it changes rounding alone;
    accumulation changes the batches of batch norm.

    Args:
      config: the configuration.
      devices: number of devices.
      remats: values of `model.remat` to try.
    """
    train = config.train
    groups = -(-train.batch_size // (train.group_size * devices))
    batch = groups * train.group_size * devices
    for accumulation in range(min(train.accumulation, groups), groups + 1):
        if groups % accumulation == 0:
            for remat in remats:
                yield scaled(config, batch, accumulation, remat)


def choose(
    tries: Iterable[ml_collections.ConfigDict], available: int, compile_step: Compile
) -> tuple[ml_collections.ConfigDict, Program]:
    """Returns the first candidate that fits `available` bytes per device.

    A candidate that cannot fit, to judge by one of the same rematerialization, is not
    compiled.

    Raises:
      ValueError: none fits.
    """
    known: dict[str, tuple[int, Program]] = {}
    for candidate in tries:
        remat, accumulation = candidate.model.remat, candidate.train.accumulation
        if remat in known:
            before, program = known[remat]
            if program.peak_at(before / accumulation) > available:
                continue
        program = compile_step(candidate)
        if program.peak <= available:
            return candidate, program
        known[remat] = accumulation, program
    raise ValueError(
        f"not even one group of images per device fits into {available / 1e9:.3g} GB: "
        "lower train.group_size, data.crop or model.width, choose a smaller "
        "model.backbone, or set model.dtype=bfloat16"
    )


def enlarge(
    chosen: ml_collections.ConfigDict,
    program: Program,
    images: int,
    available: int,
    compile_step: Compile,
) -> ml_collections.ConfigDict | None:
    """Returns the largest batch, of two to eight times as many images, that fits.

    Args:
      chosen: a configuration that fits without accumulation.
      program: its step.
      images: batches with more images than this are not tried.
      available: bytes per device.
      compile_step: compiles a candidate.
    """
    for ratio in _LARGER:
        batch = chosen.train.batch_size * ratio
        if batch <= images and program.peak_at(ratio) <= available:
            larger = scaled(chosen, batch, 1, chosen.model.remat)
            if compile_step(larger).peak <= available:
                return larger
    return None


def describe(config: ml_collections.ConfigDict) -> str:
    """Returns the settings that are found, as arguments of `launch.train`."""
    values = {
        "train.batch_size": config.train.batch_size,
        "train.accumulation": config.train.accumulation,
        "model.remat": config.model.remat,
        "optimizer.lr": f"{config.optimizer.lr:.6g}",
    }
    flat = flatten(config.to_dict())
    for name, weight in group_weights(config).items():
        if flat[name] == weight:  # It is not left to the batch.
            values[name] = f"{weight:.6g}"
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


def fit(config: ml_collections.ConfigDict) -> None:
    """Prints what fits the devices of this machine, and the hours of the run.

    Raises:
      ValueError, FileNotFoundError: bad settings or data, nothing fits, or several
        processes.
    """
    if jax.process_count() > 1:
        raise ValueError("--fit measures in one process; leave out the other ones")
    config_checks.expand_paths(config)
    config_checks.check_ranges(config)
    config_checks.check_read(config)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    config = config.copy_and_resolve_references()
    config.train.parallel = "pmap"  # shard_map computes the same
    config.imbalance.class_weights = ()  # to count them may take minutes
    facts, pipeline, _ = prepare(config)
    held = pipeline.device_cache.bytes if pipeline.device_cache is not None else 0
    config.data.resident = False
    devices = config.train.devices or len(jax.devices())
    first = build_parallel(next(candidates(config, devices)))
    available = first.memory() - held
    kind = first.devices[0].device_kind
    print(f"{devices} x {kind}, {available / 1e9:.3g} GB free on each", flush=True)

    def compile_step(candidate: ml_collections.ConfigDict) -> Program:
        setup = _make_setup(candidate, facts, pipeline)
        compiled = lower_step(candidate, first.devices, setup).compile()
        peak = peak_bytes(compiled)
        verdict = "fits" if peak <= available else "does not fit"
        text = describe(candidate)
        print(f"  {text}: {peak / 1e9:.3g} GB, {verdict}", flush=True)
        fixed = compiled.memory_analysis().argument_size_in_bytes
        return Program(peak, fixed, compiled, setup)

    remats = REMATS[REMATS.index(config.model.remat) :]
    if jax.default_backend() == "cpu":  # There XLA saves nothing by it.
        remats = remats[:1]
    tries = candidates(config, devices, remats)
    chosen, program = choose(tries, available, compile_step)
    print(f"Use {describe(chosen)}")
    print(_describe_hours(chosen, program), flush=True)
    # On a CPU a larger batch takes as much longer.
    saves = chosen.train.accumulation > 1 or chosen.model.remat != config.model.remat
    if saves or jax.default_backend() == "cpu":
        return
    images = max(pipeline.num_labeled, pipeline.num_unlabeled)
    larger = enlarge(chosen, program, images, available, compile_step)
    if larger is not None:
        print(f"A larger batch fits, too: {describe(larger)}")


def _make_setup(
    config: ml_collections.ConfigDict, facts: DatasetFacts, pipeline: TrainPipeline
) -> Setup:
    """Builds the parts of a run with other settings on the same data."""
    model, method = build_base(
        config,
        num_classes=facts.num_classes,
        pixels=facts.pixels,
        num_unlabeled=pipeline.num_unlabeled,
    )
    return build_setup(config, model, method, steps_per_epoch=pipeline.steps_per_epoch)


def _describe_hours(config: ml_collections.ConfigDict, program: Program) -> str:
    """Makes two steps; says what the second one means for the whole run."""
    parallel = build_parallel(config)
    batch = parallel.place(random_batch(config, program.setup))
    state = parallel.replicate(init_state(program.setup, config.seed))
    seconds = 0.0
    for step in range(2):
        begin = time.perf_counter()
        info = parallel.replicate(make_step_info(step))
        state, metrics = jax.block_until_ready(program.run(state, batch, info))
        del metrics
        seconds = time.perf_counter() - begin
    _, pipeline, _ = prepare(config)
    steps = total_steps(config, pipeline.steps_per_epoch)
    return (
        f"A step takes {seconds:.3g} s, and {quantity(steps, 'step')} take "
        f"{duration(steps * seconds)}, without compilation and evaluations, if "
        "images are read as fast"
    )
