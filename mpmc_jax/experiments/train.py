"""Trains a run from its configuration, or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mpmc_jax import distributed
from mpmc_jax.data.build import build_class_weights, build_eval, build_train
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.data.splits import Split
from mpmc_jax.experiments import config_checks
from mpmc_jax.experiments.base_config import get_base
from mpmc_jax.experiments.build import (
    Setup,
    build_parallel,
    build_setup,
    check_memory,
    init_state,
    state_shape,
    total_steps,
)
from mpmc_jax.experiments.evaluation import (
    checked_best_metric,
    evaluated_network,
    make_validation,
)
from mpmc_jax.experiments.identity import RunIdentity, data_facts
from mpmc_jax.experiments.pretrained import initial_weights
from mpmc_jax.experiments.run import open_model_and_method
from mpmc_jax.experiments.validation_panels import make_panels
from mpmc_jax.models import footprint
from mpmc_jax.models.registry import build_segmenter, identifying_fields
from mpmc_jax.paths import as_path
from mpmc_jax.text import quantity
from mpmc_jax.training import (
    agreement,
    loop,
    precise_bn,
    run_lock,
)
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.checkpoint.files import check_path
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.metric_writer import MetricWriter, Picture
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.state import TrainState, begin_with, to_host
from mpmc_jax.training.wandb_writer import WandbWriter, load_wandb
from mpmc_jax.types import Batch, PyTree

_LOG = logging.getLogger(__name__)

# FLOPs of a step that takes two CPU cores about half a minute; those of the quick start
# are a tenth.
_LARGE_ON_CPU = 4e11
# Images whose size is looked at.
_SAMPLED = 20
# What makes a run small, in docs/own_data.md too.
_SMALL_CROP = 97
_SMALL_RUN = {
    "train.batch_size": 2,
    "train.steps": 200,
    "optimizer.lr": 0.02,
    "optimizer.head_multiplier": 1,
    "train.precise_bn": 10,
}


def train(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> TrainState:
    """Trains a run to its last step; a directory that holds a run resumes it.

    Sets JAX's default matmul precision to the run's.

    Args:
      config: its configuration, as made by a file of `configs/`.
      workdir: directory of its checkpoints and metrics; made if it does not exist.

    Returns:
      The last state, on the host.

    Raises:
      ValueError, FileNotFoundError: bad settings or data; the message says how to fix
        it.
      WorkdirError: the directory holds another run, or data.
      NonFiniteError, Interrupted: training stopped; the state is saved.
    """
    directory = as_path("--workdir", os.fspath(workdir))
    begins = bool(distributed.from_first(not workdir_lib.has_steps(directory)))
    with agreement.failing_together():
        _check_workdir(directory)
        training = build_training(config, begins)
    model, networks = training.setup.model, training.setup.step.method.networks
    pretrained = functools.cache(lambda: initial_weights(config, model, len(networks)))
    origin = {}
    if begins:
        # Weights that do not fit are refused before the directory is taken.
        with agreement.failing_together():
            origin = {"pretrained": pretrained()[1] or None}
    identity = RunIdentity(config, training.data_facts(), origin)
    identity.check_processes()
    with run_lock.hold(directory):
        identity.check_directory(directory)
        folder, keep = directory / workdir_lib.CHECKPOINTS, config.train.keep
        checkpointer = Checkpointer(folder, keep, identity.trained_on())
        state, position = initial_state(
            config.seed, training.setup, checkpointer, pretrained
        )
        identity.write(directory, training.pipeline)
        with agreement.failing_together():
            writer = training.metric_writer(directory, int(state.step), config)
        data = training.pipeline.iterator(position)
        with contextlib.closing(data), contextlib.closing(writer), checkpointer:
            return loop.train(
                training.loop_config,
                training.setup.step,
                training.parallel,
                state,
                data,
                evaluate=training.validate,
                checkpointer=checkpointer,
                report=writer,
                names=functools.partial(image_ids, training.pipeline.split),
                place=training.place,
                recompute_bn_stats=training.recompute_bn_stats,
                panels=training.panels,
            )


def _check_workdir(directory: Path) -> None:
    """Refuses a directory that cannot hold checkpoints, or that holds data."""
    check_path(directory.absolute())
    workdir_lib.check_not_data(directory)


@dataclasses.dataclass(frozen=True)
class Training:
    """What training needs besides the run's directory.

    Attributes:
      facts: facts of the data set.
      pipeline: the training batches.
      setup: network, method, plug-in and step.
      parallel: the devices.
      place: puts a batch on the devices.
      loop_config: the run's length, and how often it logs, evaluates and saves.
      validate: evaluates a state on the validation split.
      recompute_bn_stats: see `make_bn_recompute`.
      panels: see `make_panels`.
    """

    facts: DatasetFacts
    pipeline: TrainPipeline
    setup: Setup
    parallel: Parallel
    place: Callable[[Batch], Batch]
    loop_config: loop.LoopConfig
    validate: Callable[[TrainState], dict[str, float]]
    recompute_bn_stats: Callable[[TrainState], TrainState] | None
    panels: Callable[[TrainState], dict[str, Picture]] | None

    def data_facts(self) -> dict[str, Any]:
        """Describes the data, which may not change when the run resumes."""
        weights = self.setup.step.supervised_loss.class_weights
        return data_facts(self.facts, self.pipeline, weights)

    def metric_writer(
        self, directory: Path, start: int, config: ml_collections.ConfigDict
    ) -> MetricWriter:
        """Makes the writer of the run's metrics from step `start` on.

        Raises:
          ValueError: see `WandbWriter`.
        """
        step, project = self.setup.step, config.train.wandb

        def further() -> list[WandbWriter]:
            settings = config.to_dict()
            return [WandbWriter(project, directory, settings)] if project else []

        return MetricWriter(
            directory,
            start,
            self.loop_config.steps,
            self.setup.step.method.streams.images(step.batch_size, step.group_size),
            classes=self.facts.class_names,
            rampup=step.rampup,
            further=further,
        )


def build_training(config: ml_collections.ConfigDict, begins: bool) -> Training:
    """Builds all that training needs, so that mistakes show before the first step.

    Args:
      config: the run's configuration.
      begins: whether the run has no step yet; one that has keeps its settings, also
        those that nothing reads.

    Raises:
      ValueError, FileNotFoundError: bad settings or data; the message says how to fix
        it.
    """
    config_checks.expand_paths(config)
    config_checks.check_ranges(config)
    if begins:
        config_checks.check_read(config)
    if config.train.wandb:
        load_wandb()
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    facts, pipeline, setup = prepare(config)
    parallel = build_parallel(config)
    check_memory(config, setup, len(parallel.devices), parallel.memory())
    place = make_place(pipeline, parallel)
    metric = checked_best_metric(config, setup, facts)
    loop_config = make_loop_config(config, pipeline.steps_per_epoch, metric)
    log_summary(config, setup, pipeline, loop_config, parallel)
    log_large_on_cpu(config, setup, parallel)
    log_large_crop(config)
    if facts.partial:
        _LOG.warning("%s is partial: not as many images as published", facts.dataset)
    return Training(
        facts,
        pipeline,
        setup,
        parallel,
        place,
        loop_config,
        validate=make_validation(config, setup, facts),
        recompute_bn_stats=make_bn_recompute(config, setup, pipeline, parallel, place),
        panels=make_panels(config, setup, facts),
    )


def prepare(
    config: ml_collections.ConfigDict,
) -> tuple[DatasetFacts, TrainPipeline, Setup]:
    """Builds the facts of the data set, the training pipeline and the parts of a run.

    Raises:
      ValueError, FileNotFoundError: bad settings or data; the message says how to fix
        it.
    """
    facts, model, method = open_model_and_method(config)
    pipeline = build_train(
        config,
        method.streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    setup = build_setup(
        config,
        model,
        method,
        steps_per_epoch=pipeline.steps_per_epoch,
        class_weights=build_class_weights(config, pipeline.split),
    )
    return facts, pipeline, setup


def make_loop_config(
    config: ml_collections.ConfigDict, steps_per_epoch: int, metric: str
) -> loop.LoopConfig:
    """Reads the run's length, and how often it logs, evaluates and saves."""
    return loop.LoopConfig(
        steps=total_steps(config, steps_per_epoch),
        log_every=config.train.log_every,
        eval_every=config.train.eval_every or steps_per_epoch,
        checkpoint_every=config.train.checkpoint_every or steps_per_epoch,
        metric=f"val/{metric}",
        patience=config.train.patience,
    )


def initial_state(
    seed: int,
    setup: Setup,
    checkpointer: Checkpointer,
    pretrained: Callable[[], tuple[PyTree, dict[str, Any]]],
) -> tuple[TrainState, int]:
    """Returns the state and data position of the newest checkpoint or of a new run.

    Args:
      seed: seed of a new run.
      setup: the run's parts.
      checkpointer: checkpoints of the run's directory.
      pretrained: reads the initial weights of a new run, see `initial_weights`.
    """
    restored = checkpointer.restore_latest(state_shape(setup))
    if restored is None:
        _LOG.info("initializing the networks")
        state = to_host(init_state(setup, seed))
        variables, _ = pretrained()
        return (begin_with(state, variables) if variables else state), 0
    _LOG.info("resuming from step %d", restored.step)
    return restored.state, restored.data_state["next_index"]


def log_summary(
    config: ml_collections.ConfigDict,
    setup: Setup,
    pipeline: TrainPipeline,
    loop_config: loop.LoopConfig,
    parallel: Parallel,
) -> None:
    """Logs what the run trains on and for how long, and warns about odd settings."""
    overlap = set(pipeline.split.labeled) & set(pipeline.split.unlabeled)
    _LOG.info(
        "%s (each %.1f times per epoch), %d unlabeled%s; %s per epoch, %d in all; %s",
        quantity(pipeline.num_labeled, "labeled image"),
        pipeline.repetition,
        pipeline.num_unlabeled,
        " with the labeled ones among them" if overlap else "",
        quantity(pipeline.steps_per_epoch, "step"),
        loop_config.steps,
        quantity(len(parallel.devices), "device"),
    )
    for warning in pipeline.warnings:
        _LOG.warning("%s", warning)
    if pipeline.unused:
        _LOG.warning(
            "%s not used: the method's authors take no more labeled images than there "
            "are unlabeled ones; add unlabeled images, or change the method",
            quantity(pipeline.unused, "labeled image"),
        )
    sizes = setup.step.method.streams.sizes(
        config.train.batch_size, config.train.group_size
    )
    if pipeline.num_unlabeled < sizes.get("unlabeled", 0):
        _LOG.warning(
            "train.batch_size=%d takes %s per step, but there are %d: some come twice "
            "in a batch",
            config.train.batch_size,
            quantity(sizes["unlabeled"], "unlabeled image"),
            pipeline.num_unlabeled,
        )
    last_epoch = (loop_config.steps - 1) // pipeline.steps_per_epoch
    if setup.step.method.phase(last_epoch) != setup.step.method:
        _LOG.warning(
            "the warm-up, without unlabeled images, lasts the whole run of %s (%d per "
            "epoch); lower u2pl.warmup_epochs or train longer",
            quantity(loop_config.steps, "step"),
            pipeline.steps_per_epoch,
        )


def log_large_on_cpu(
    config: ml_collections.ConfigDict, setup: Setup, parallel: Parallel
) -> None:
    """Logs what makes the run small if its steps are large for a CPU."""
    sizes = setup.step.method.streams.sizes(
        config.train.batch_size, config.train.group_size
    )
    images = sizes["labeled"] + sizes.get("unlabeled", 0)
    flops = footprint.training_flops(setup.model, images, config.data.crop)
    if parallel.devices[0].platform == "cpu" and flops > _LARGE_ON_CPU:
        argument, flags = _small_run(config, setup)
        _LOG.warning(
            "a step of %d crops of %d pixels may take minutes on a CPU; for a first "
            "try append :%s to --config (with a comma if it has a colon) and add %s, "
            "see 'The first run on a CPU' in docs/own_data.md",
            images,
            config.data.crop,
            argument,
            flags,
        )


def log_large_crop(config: ml_collections.ConfigDict) -> None:
    """Logs a crop that no resized image fills, by the first validation images."""
    data, dataset = config.data, build_eval(config, "val")
    sizes = [dataset.size(i) for i in range(min(len(dataset), _SAMPLED))]
    largest = max((max(size) for size in sizes), default=0)
    reached = data.scale_max * (data.scale_base or largest)
    # ACDC's geometry resizes every image to the crop.
    if sizes and data.crop > reached and data.geometry != "acdc":
        _LOG.warning(
            "crops of %d pixels are always partly padding: images of up to %d pixels a "
            "side are enlarged by data.scale_max=%g at most; set a smaller data.crop",
            data.crop,
            largest,
            data.scale_max,
        )


def _small_run(config: ml_collections.ConfigDict, setup: Setup) -> tuple[str, str]:
    """Returns what makes a run as small as the quick start's.

    Returns:
      The end of the argument of --config, and the further arguments.
    """
    multiple = build_segmenter(setup.model).multiple
    crop = min(_SMALL_CROP, config.data.crop)
    argument = f"crop={max(crop // multiple, 1) * multiple}"
    settings = dict(_SMALL_RUN)
    if "backbone" in identifying_fields(setup.model):
        argument = f"backbone=resnet18,{argument}"
        # A decoder that reads a vision transformer does not read a ResNet.
        if setup.model.name != (usual := get_base().model.name):
            argument = f"model={usual},{argument}"
        if config.model.pretrained:
            settings["model.pretrained"] = ""
    # A batch is whole groups, for each of the accumulated passes.
    most = {"train.group_size": settings["train.batch_size"], "train.accumulation": 1}
    settings |= {k: v for k, v in most.items() if config[k] > v}
    return argument, " ".join(f"--config.{k}={v}" for k, v in settings.items())


def make_place(pipeline: TrainPipeline, parallel: Parallel) -> Callable[[Batch], Batch]:
    """Returns the function that puts batches on the devices.

    With `data.resident`, first puts the data set's images on every device.

    Raises:
      ValueError: the images are too large for a device.
    """
    device_cache = pipeline.device_cache
    if device_cache is None:
        return parallel.place
    if device_cache.bytes > parallel.memory() / 2:
        raise ValueError(
            f"data.resident=true: the images take {device_cache.bytes / 1e9:.2f} GB of "
            f"a device of {parallel.memory() / 1e9:.2f} GB; set data.resident=false"
        )
    return parallel.placing(device_cache.arrays, device_cache.cut)


def make_bn_recompute(
    config: ml_collections.ConfigDict,
    setup: Setup,
    pipeline: TrainPipeline,
    parallel: Parallel,
    place: Callable[[Batch], Batch],
) -> Callable[[TrainState], TrainState] | None:
    """Returns the function that `train.precise_bn` asks for; None without it.

    It recomputes the batch-norm statistics of a replicated state's students, or of
    their averages if one of these is evaluated, from the first `train.precise_bn`
    batches.
    """
    batches = config.train.precise_bn
    if not batches:
        return None

    def read() -> Iterator[Batch]:
        data = pipeline.iterator(requests=False)
        try:
            yield from (place(next(data)) for _ in range(batches))
        finally:
            data.close()

    recompute = precise_bn.make_bn_recompute(parallel, setup.step, read, batches)

    def recompute_bn_stats(state: TrainState) -> TrainState:
        network = evaluated_network(config, setup, parallel.fetch(state))
        return recompute(state, network.averaged)

    return recompute_bn_stats


def image_ids(split: Split, batch: Batch) -> dict[str, list[str]]:
    """Returns the ids of a batch's images by stream."""
    ids = {"labeled": [split.labeled[i] for i in batch.labeled.index]}
    if batch.unlabeled is not None:
        ids["unlabeled"] = [split.unlabeled[i] for i in batch.unlabeled.index]
    if batch.partner is not None:
        ids["partner"] = [split.unlabeled[i] for i in batch.partner.index]
    if batch.source is not None:
        present = batch.source.extent.any(axis=1)
        ids["source"] = [split.labeled[i] for i in batch.source.index[present]]
    return ids
