"""What the launch programs share: building a run's parts and opening a finished one."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from mpmc_jax import distributed
from mpmc_jax.data.build import build_eval, build_split, build_train, dataset_info
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.data.evaluation_source import EvalSource
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.evaluation.evaluator import Evaluator, PatchProbe
from mpmc_jax.evaluation.predict import network_input, predict_classes
from mpmc_jax.evaluation.protocols import Protocol, build_protocol, resize_nearest
from mpmc_jax.experiments import base_config
from mpmc_jax.experiments.build import (
    Setup,
    averages,
    build_base,
    build_setup,
    state_shape,
)
from mpmc_jax.methods.base import Method
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.paths import as_path
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.plugins.mpmc.plugin import MPMC, patch_targets
from mpmc_jax.training import agreement
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.checkpoint import manager as checkpoint_lib
from mpmc_jax.training.gradient import teaching
from mpmc_jax.training.manifest import make_manifest
from mpmc_jax.training.state import TrainState, select
from mpmc_jax.types import Array, Network, PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """A run read back from its directory.

    Attributes:
      config: its configuration.
      facts: of the data set it was trained on.
      model: its network's configuration.
      module: the segmenter.
      variables: {"params", "batch_stats"} of the network to use.
      step: the checkpoint's step.
      network_name: "teacher" or "student".
      plugin: its plug-in.
      probe: its patch classifier as training uses it, or None without MPMC.
      manifest: what the run wrote of its circumstances.
    """

    config: ml_collections.ConfigDict
    facts: DatasetFacts
    model: ModelConfig
    module: Any
    variables: PyTree
    step: int
    network_name: str
    plugin: Plugin
    probe: PatchProbe | None
    manifest: dict[str, Any]


def base_for(
    config: ml_collections.ConfigDict, facts: DatasetFacts, num_unlabeled: int
) -> tuple[ModelConfig, Method]:
    """Network configuration and base method of a run on such a data set."""
    return build_base(
        config,
        num_classes=facts.num_classes,
        pixels=facts.pixels,
        num_unlabeled=num_unlabeled,
    )


def open_base(
    config: ml_collections.ConfigDict,
) -> tuple[DatasetFacts, ModelConfig, Method]:
    """Facts of the prepared data set, and what `base_for` makes of its split."""
    info = dataset_info(config)
    unlabeled = len(build_split(config, info).unlabeled)
    return info.facts, *base_for(config, info.facts, unlabeled)


def prepare(
    config: ml_collections.ConfigDict,
) -> tuple[DatasetFacts, TrainPipeline, Setup]:
    """Facts of the data set, pipeline and parts of a run.

    Raises:
      ValueError, FileNotFoundError: bad settings or data; the message has the mend.
    """
    facts, model, method = open_base(config)
    pipeline = build_train(
        config,
        method.streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    setup = build_setup(config, model, method, steps_per_epoch=pipeline.steps_per_epoch)
    return facts, pipeline, setup


def make_evaluator(
    config: ml_collections.ConfigDict, module: Any, facts: DatasetFacts
) -> Evaluator:
    """The evaluator that `config.eval` describes.

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


def make_protocol(config: ml_collections.ConfigDict) -> Protocol:
    """The protocol that `config.eval` names, its windows as large as training crops.

    Raises:
      ValueError: see `build_protocol`.
    """
    settings = config.eval
    return build_protocol(
        settings.protocol, config.data.crop, tuple(settings.scales), settings.flip
    )


def check_network(config: ml_collections.ConfigDict, setup: Setup) -> None:
    """Refuses a network to evaluate that the run does not have.

    Raises:
      ValueError: an unknown choice, or a teacher where there is none.
    """
    choice = config.eval.network
    if choice not in ("auto", "student", "teacher"):
        raise ValueError(
            f"eval.network={choice!r} is unknown; valid: ['auto', 'student', 'teacher']"
        )
    if choice == "teacher" and not averages(setup.method):
        raise ValueError(
            f"eval.network='teacher', but method.name={config.method.name!r} keeps no "
            "average; use 'auto' or set method.ema_decay"
        )


def network_to_use(
    config: ml_collections.ConfigDict, setup: Setup, state: TrainState
) -> str:
    """Which network is evaluated: "student" or "teacher".

    Left open, it is the teacher where one is averaged, but the student during a
    warm-up: the phase of the state's last step decides.
    """
    if config.eval.network != "auto":
        return config.eval.network
    if state.ema_params is None:
        return "student"
    last = max(int(state.step) - 1, 0)
    return setup.method.phase(last // setup.step.steps_per_epoch).evaluated


def probe_builder(setup: Setup) -> Callable[[TrainState], PatchProbe | None]:
    """State -> its patch classifier as it weighs pseudo-labels in training (D24).

    So it is the teacher's, with its network and head, whatever network is evaluated.
    The returned probes share one function, so that they share compiled programs.
    """
    plugin = setup.plugin
    if not isinstance(plugin, MPMC):
        return lambda state: None
    network = setup.method.networks[0]
    module = setup.step.teachers[network]

    def apply(variables: PyTree, images: Array, labels: Array):
        teacher = Network(module, **variables["network"])
        logits = plugin.teacher_logits(teacher, variables["head"], images)
        _, rows, columns, _ = logits.shape
        targets, valid = patch_targets(
            labels, plugin.num_classes, plugin.field, size=(rows, columns)
        )
        return logits, targets, valid

    def build(state: TrainState) -> PatchProbe:
        teachers, head = teaching(setup.step, state)
        teacher = teachers[network]
        variables = {"params": teacher.params, "batch_stats": teacher.batch_stats}
        return PatchProbe({"network": variables, "head": head}, apply)

    return build


def open_run(workdir: Path, checkpoint: str = "best") -> Run:
    """Reads a run back, which may be under way.

    What it was trained on is in the checkpoint; config.json beside it says how.

    Args:
      workdir: its directory.
      checkpoint: "best", "last" or a step.

    Raises:
      WorkdirError, CheckpointError, FileNotFoundError: what is missing, and the mend.
    """
    directory = workdir / workdir_lib.CHECKPOINTS
    if not directory.is_dir():
        raise workdir_lib.WorkdirError(
            f"{workdir} holds no run: {directory} does not exist"
        )
    try:
        step = checkpoint_lib.find(directory, checkpoint)
        run = checkpoint_lib.read_run(directory, step)
        config = workdir_lib.load(workdir, base_config.get_base(), run)
        jax.config.update("jax_default_matmul_precision", config.matmul_precision)
        facts = DatasetFacts.read(run["data"])
        model, method = base_for(config, facts, run["data"]["unlabeled"])
        setup = build_setup(
            config, model, method, steps_per_epoch=run["steps_per_epoch"]
        )
        restored = checkpoint_lib.read(directory, step, state_shape(setup))
    except checkpoint_lib.CheckpointGoneError:
        # The run goes on, and keeps another one as the best or the last.
        return open_run(workdir, checkpoint)
    check_network(config, setup)
    which = network_to_use(config, setup, restored.state)
    network = setup.method.networks[0]
    return Run(
        config=config,
        facts=facts,
        model=model,
        module=setup.step.modules[network],
        variables=select(restored.state, network, averaged=which == "teacher"),
        step=restored.step,
        network_name=which,
        plugin=setup.plugin,
        probe=probe_builder(setup)(restored.state),
        manifest=workdir_lib.read_manifest(workdir, run),
    )


def check_same(run: Run, split: str) -> None:
    """Compares what the processes of one evaluation are about to compute.

    Raises:
      SharedError: settings, checkpoint, data or versions differ; names them.
      FileNotFoundError, ValueError: the run's data set is not there.
    """
    if distributed.is_alone():
        return
    config = workdir_lib.flatten(run.config.to_dict())
    for name in workdir_lib.OF_A_PROCESS:
        del config[name]
    facts = dataset_info(run.config).facts
    data = {"split": split, "fingerprint": facts.fingerprint}
    agreement.check_same(
        {
            "config": config,
            "step": run.step,
            "network": run.network_name,
            "pretrained": run.manifest.get("pretrained"),
            **make_manifest(run.config.seed, data),
            "platform": "",
        }
    )


def use_data(run: Run, data_dir: str, dataset: str = "", *, other: bool = False) -> Run:
    """The run with its data set elsewhere, or with another data set.

    Args:
      run: a run.
      data_dir: folder of prepared data sets; "" for the run's own.
      dataset: name of the data set; "" for the run's own.
      other: whether it is another data set than the run was trained on; its images are
        normalized as the run's.

    Raises:
      ValueError: another data set that was not asked for, or with other classes or
        channels; the run's own where another was asked for.
      FileNotFoundError: no such data set.
    """
    data = run.config.data
    if data_dir:
        data.data_dir = str(as_path("--data_dir", data_dir))
    if dataset not in ("", data.name) and not other:
        raise ValueError(
            f"--dataset={dataset}: the run was trained on {data.name!r}; --other_data "
            "evaluates it on another data set of the same classes"
        )
    data.name = dataset or data.name
    if not other:
        return run
    info = dataset_info(run.config)
    there = info.facts
    if there.fingerprint == run.facts.fingerprint:
        raise ValueError(
            f"--other_data: {info.directory} is the data set that the run was trained "
            "on; leave the argument out"
        )

    def shape(facts: DatasetFacts) -> dict[str, Any]:
        pixels = facts.pixels
        return {
            "classes": list(facts.class_names),
            "channels": pixels.channels,
            "dtype": pixels.dtype,
        }

    if different := _differences(shape(there), shape(run.facts)):
        raise ValueError(
            f"--other_data: {info.directory} does not fit the run: {different}"
        )
    facts = dataclasses.replace(there, pixels=run.facts.pixels)
    return dataclasses.replace(run, facts=facts)


def open_split(run: Run, split: str) -> EvalSource:
    """Labeled images of a split, from the run's data set as it is now.

    Raises:
      FileNotFoundError, ValueError: see `EvalSource`; or these are other data than the
        run was trained on.
    """
    source = build_eval(run.config, split)
    names = ("dataset", "fingerprint", "class_names")
    there, wanted = (
        {name: getattr(facts, name) for name in names}
        for facts in (source.info.facts, run.facts)
    )
    if different := _differences(there, wanted):
        mend = "give the folder of the run's data as --data_dir"
        if there["class_names"] == wanted["class_names"]:
            mend += ", or evaluate the run on these: launch.evaluate --other_data"
        raise ValueError(
            f"{source.info.directory} holds other data than the run was trained on "
            f"({different}); {mend}"
        )
    return source


def _differences(there: dict[str, Any], run: dict[str, Any]) -> str:
    """What of a data set differs from the run's, in words; "" for nothing."""
    return "; ".join(
        f"{name} {there[name]} there, {run[name]} in the run"
        for name in run
        if there[name] != run[name]
    )


def trust_function(run: Run) -> Callable[[Array, Array], tuple[Array, Array]]:
    """(images (b,h,w,c), labels (b,h,w)) -> the run's classes and their lambda_s.

    lambda_s weighs each prediction as training would weigh it as a pseudo-label (eq.
    5), but for the division by a batch's mean (`mpmc.lambda_scale=mean`).

    Raises:
      ValueError: the run has no patch classifier.
    """
    probe, plugin = run.probe, run.plugin
    if probe is None or not isinstance(plugin, MPMC):
        raise ValueError("this run has no patch classifier (mpmc=off): no lambda_s")
    if plugin.lambda_scale == "mean":
        plugin = dataclasses.replace(plugin, lambda_scale="none")
    protocol = make_protocol(run.config)

    @bounded_jit()
    def trust(
        variables: PyTree, head: PyTree, images: Array, labels: Array
    ) -> tuple[Array, Array]:
        normalized = network_input(images, run.facts.pixels)
        seen, targets = protocol.probed(normalized, labels)
        pseudo = predict_classes(run.module, variables, seen)
        logits, _, _ = probe.apply(head, seen, targets)
        weight, _ = plugin.weigh(logits, pseudo)
        size = labels.shape[1:]
        return resize_nearest(pseudo, size=size), resize_nearest(weight, size=size)

    return functools.partial(trust, run.variables, probe.variables)
