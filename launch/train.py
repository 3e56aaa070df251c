r"""Trains a run, or goes on with it.

python -m launch.train --config=configs/camvid.py:method=unimatch,mpmc=recommended \
    --workdir=runs/camvid [--config.train.steps=1000]

The same command again resumes from the newest intact checkpoint.
"""

import contextlib
import dataclasses
import functools
import logging
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from launch import cli, multihost
from mpmc_jax import distributed
from mpmc_jax.data.build import build_eval
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.experiments import config_checks, pretrained
from mpmc_jax.experiments import run as runs
from mpmc_jax.experiments.batches import make_bn_recompute, make_place, names_of
from mpmc_jax.experiments.build import (
    Setup,
    build_parallel,
    check_memory,
    init_state,
    state_shape,
    total_steps,
)
from mpmc_jax.paths import as_path
from mpmc_jax.training import (
    agreement,
    loop,
    metric_writer,
    run_lock,
    workdir,
)
from mpmc_jax.training.checkpoint.files import check_path
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.manifest import make_manifest
from mpmc_jax.training.parallel import Parallel
from mpmc_jax.training.state import TrainState, begin_with, select, to_host
from mpmc_jax.types import PyTree

_LOG = logging.getLogger("mpmc_jax.train")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "configs/DATASET.py[:KEY=VALUE,...] with the keys method, mpmc, split, lists, "
    "crop, backbone and model (see the README); --config.a.b=VALUE sets what "
    "configs/base.py lists.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Directory of the run; one that holds a run goes on with it."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that JAX finds (TPU pods)."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "One of several, told by hand: HOST:PORT of process 0,"
)
_PROCESSES = flags.DEFINE_integer("processes", 0, "how many there are,")
_PROCESS = flags.DEFINE_integer("process", -1, "and which this one is.")


# What a mistyped value is told, instead of Python's own words.
_TRUTH = "True or False is needed, not"
_WHOLE, _NUMBER = "a whole number is needed, not", "a number is needed, not"


def loop_config(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> loop.LoopConfig:
    """Rhythm of the run; 0 means once an epoch."""
    return loop.LoopConfig(
        steps=total_steps(config, steps_per_epoch),
        log_every=config.train.log_every,
        eval_every=config.train.eval_every or steps_per_epoch,
        checkpoint_every=config.train.checkpoint_every or steps_per_epoch,
        metric=f"val/{runs.make_protocol(config).metric}",
    )


def make_evaluate(
    config: ml_collections.ConfigDict, setup: Setup, facts: DatasetFacts
) -> Callable[[TrainState], dict[str, float]]:
    """One copy of the state -> the numbers of the validation split.

    Raises:
      ValueError: a network to evaluate that the run does not have.
    """
    runs.check_network(config, setup)
    source = build_eval(config, "val")
    network = setup.method.networks[0]
    module = setup.step.modules[network]
    evaluator = runs.make_evaluator(config, module, facts)
    evaluator.check(source)
    probe = runs.probe_builder(setup)

    def evaluate(state: TrainState) -> dict[str, float]:
        which = runs.network_to_use(config, setup, state)
        variables = select(state, network, averaged=which == "teacher")
        result = evaluator.run(variables, source, probe(state))
        scalars = result.scalars(facts.class_names)
        scalars["pad_to"] = result.pad_to
        return {f"val/{name}": value for name, value in scalars.items()}

    return evaluate


def initial_state(
    seed: int,
    setup: Setup,
    checkpointer: Checkpointer,
    beginning: Callable[[], tuple[PyTree, dict]],
) -> tuple[TrainState, int]:
    """State and data position: those of the newest checkpoint, or the beginning."""
    restored = checkpointer.restore_latest(state_shape(setup))
    if restored is None:
        _LOG.info("making the networks")
        state = to_host(init_state(setup, seed))
        variables, _ = beginning()
        return (begin_with(state, variables) if variables else state), 0
    _LOG.info("going on from step %d", restored.step)
    return restored.state, restored.data_state["next_index"]


def announce(
    config: ml_collections.ConfigDict,
    setup: Setup,
    pipeline: TrainPipeline,
    rhythm: loop.LoopConfig,
    parallel: Parallel,
) -> None:
    """Says what the run trains on, and for how long."""
    both = set(pipeline.split.labeled) & set(pipeline.split.unlabeled)
    _LOG.info(
        "%d labeled images (each %.1f times an epoch), %d unlabeled%s; %d steps an "
        "epoch, %d in all; %d devices",
        pipeline.num_labeled,
        pipeline.repetition,
        pipeline.num_unlabeled,
        " with the labeled ones among them" if both else "",
        pipeline.steps_per_epoch,
        rhythm.steps,
        len(parallel.devices),
    )
    for warning in pipeline.warnings:
        _LOG.warning("%s", warning)
    if pipeline.unused:
        _LOG.warning(
            "%d labeled images stay unused: the method's authors take no more of them "
            "than there are unlabeled ones; add such images, or change the method",
            pipeline.unused,
        )
    sizes = setup.method.streams.sizes(config.train.batch_size, config.train.group_size)
    if pipeline.num_unlabeled < sizes.get("unlabeled", 0):
        _LOG.warning(
            "train.batch_size=%d takes %d unlabeled images a step, but there are %d: "
            "some come twice in a batch",
            config.train.batch_size,
            sizes["unlabeled"],
            pipeline.num_unlabeled,
        )
    last = (rhythm.steps - 1) // pipeline.steps_per_epoch
    if setup.method.phase(last) != setup.method:
        _LOG.warning(
            "the warm-up, without unlabeled images, lasts the whole run of %d steps "
            "(%d an epoch); lower u2pl.warmup_epochs or train longer",
            rhythm.steps,
            pipeline.steps_per_epoch,
        )


def train(config: ml_collections.ConfigDict, directory: Path) -> TrainState:
    """Trains `config` in `directory` to its last step; returns the last state."""
    with agreement.failing_together():
        config_checks.check_ranges(config)
        check_path(directory.absolute())
        jax.config.update("jax_default_matmul_precision", config.matmul_precision)
        facts, pipeline, setup = runs.prepare(config)
        parallel = build_parallel(config)
        check_memory(config, setup, len(parallel.devices), parallel.memory())
        place = make_place(pipeline, parallel)
        rhythm = loop_config(config, pipeline.steps_per_epoch)
        announce(config, setup, pipeline, rhythm, parallel)
        if facts.partial:
            _LOG.warning(
                "%s is partial: not as many images as published", facts.dataset
            )
        evaluate = make_evaluate(config, setup, facts)
        recompute_bn_stats = make_bn_recompute(config, setup, pipeline, parallel, place)
    beginning = functools.cache(lambda: pretrained.read(config, setup.model))
    told = {}
    if distributed.from_first(not workdir.has_steps(directory)):
        # Weights that do not fit are refused before the directory is taken.
        with agreement.failing_together():
            told = {"pretrained": beginning()[1] or None}
    record = _Record(config, describe(facts, pipeline), told)
    record.check_same()
    with run_lock.hold(directory):
        record.check(directory)
        checkpointer = Checkpointer(
            directory / workdir.CHECKPOINTS, config.train.keep, record.trained_on()
        )
        state, position = initial_state(config.seed, setup, checkpointer, beginning)
        record.write(directory, pipeline)
        sizes = (config.train.batch_size, config.train.group_size)
        images = setup.method.streams.images(*sizes)
        reporter = metric_writer.MetricWriter(
            directory,
            int(state.step),
            rhythm.steps,
            images,
            classes=facts.class_names,
            rampup=setup.step.rampup,
        )
        data = pipeline.iterator(position)
        with contextlib.closing(data), contextlib.closing(reporter), checkpointer:
            return loop.train(
                rhythm,
                setup.step,
                parallel,
                state,
                data,
                evaluate=evaluate,
                checkpointer=checkpointer,
                report=reporter,
                names=functools.partial(names_of, pipeline.split),
                place=place,
                recompute_bn_stats=recompute_bn_stats,
            )


def describe(facts: DatasetFacts, pipeline: TrainPipeline) -> dict[str, Any]:
    """The data of a run, which may not change while it lasts."""
    split = pipeline.split
    data = {
        **dataclasses.asdict(facts),
        "labeled": pipeline.num_labeled,
        "unlabeled": pipeline.num_unlabeled,
        "split_crc32": zlib.crc32(repr((split.labeled, split.unlabeled)).encode()),
    }
    return {"data": data, "steps_per_epoch": pipeline.steps_per_epoch}


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a run is, for the other processes, its directory and its checkpoints.

    Attributes:
      config: its configuration.
      facts: its data, see `describe`.
      told: of the weights that it begins with.
    """

    config: ml_collections.ConfigDict
    facts: dict[str, Any]
    told: dict[str, Any]

    def circumstances(self) -> dict[str, Any]:
        return make_manifest(self.config.seed, self.facts["data"]) | self.told

    def check_same(self) -> None:
        """Compares this process's run with those of the others."""
        config = workdir.flatten(self.config.to_dict())
        for name in workdir.OF_A_PROCESS:
            del config[name]
        # Hosts may differ in what is below Python.
        around = self.circumstances() | {"platform": ""}
        around["jax_enable_x64"] = jax.config.jax_enable_x64  # pyright: ignore
        del around["seed"]  # the configuration's
        agreement.check_same({"--config": config, **around, **self.facts})

    def check(self, directory: Path) -> None:
        """Compares it with the files of the run that is there."""
        with agreement.failing_together():
            if distributed.is_first():
                workdir.check(directory, self.config, self.facts)

    def trained_on(self) -> dict[str, Any]:
        return workdir.trained_on(self.config, self.facts)

    def write(self, directory: Path, pipeline: TrainPipeline) -> None:
        """Writes config.json, manifest.json and splits/."""
        with agreement.failing_together():
            if distributed.is_first():
                workdir.write(directory, self.config, self.facts, self.circumstances())
                pipeline.split.save(directory / "splits")


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but a mistake is one line, and --help no failure."""
    if "--help" in argv:
        app.usage(shorthelp=True, exitcode=0)
    try:
        config_checks.check_keys(argv)
        rest = flags.FLAGS(argv)[1:]
        missing = [
            flag.name for flag in (_CONFIG, _WORKDIR) if flag.value in (None, "")
        ]
        if not missing:
            _ = _CONFIG.value.format_version  # fails if the file could not be read
    except (flags.Error, ValueError, OSError, AttributeError) as error:
        # ml_collections wraps what a configuration file raised; its reason is last.
        reason = str(error).strip().splitlines()[-1].strip()
        reason = reason.removeprefix("ValueError: ").removeprefix("[Errno 2] ")
        reason = reason.replace("invalid literal for int() with base 10:", _WHOLE)
        reason = reason.replace("could not convert string to float:", _NUMBER)
        reason = re.sub(r"\('Non-boolean.*, ('.*')\)", rf"{_TRUTH} \1", reason)
        if isinstance(error, AttributeError):
            if "get_config" not in reason:
                raise  # a mistake within the file: its place is wanted
            reason = "--config names a file without get_config"
        shared = ("__init__", "base", "presets")
        files = sorted(Path("configs").glob("*.py"))
        files = [str(path) for path in files if path.stem not in shared]
        nothing = "No such file" in reason or "get_config" in reason
        there = f"; there are {files}" if nothing else ""
        sys.exit(f"error: {reason}{there}")
    if missing:
        sys.exit(f"error: --{missing[0]} is needed; --help says more")
    if rest:
        sys.exit(f"error: unexpected arguments {rest}; options are --name=value")
    return argv[:1]


def main(argv: list[str]) -> None:
    """Entry point; user errors end with one line and status 1."""
    del argv  # `parse_flags` has read it.
    absl_logging.set_verbosity(absl_logging.WARNING)
    metric_writer.setup_logging()
    cli.setup_runtime()
    with multihost.ending_together(), cli.user_errors():
        multihost.join(
            found=_DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            count=_PROCESSES.value,
            index=_PROCESS.value,
        )
        config_checks.expand_paths(_CONFIG.value)
        train(_CONFIG.value, as_path("--workdir", _WORKDIR.value))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
