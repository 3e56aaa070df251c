"""A trained run: restored from its directory, it predicts and is evaluated.

run = load_run("runs/camvid")  # or a file of launch.convert_weights, hub:OWNER/NAME
classes = run.predict("image.jpg")
result = run.evaluate("val")
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import jax
import ml_collections
import numpy as np

from mpmc_jax import distributed
from mpmc_jax.data.build import build_eval, build_split, dataset_info
from mpmc_jax.data.dataset import DatasetFacts, EvalDataset
from mpmc_jax.data.decode import decode_array
from mpmc_jax.evaluation.evaluator import EvalResult, PatchProbe
from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.evaluation.volumes import VolumeScores
from mpmc_jax.experiments import base_config
from mpmc_jax.experiments.build import (
    build_base,
    build_setup,
    model_config,
    state_shape,
)
from mpmc_jax.experiments.evaluation import (
    check_network,
    evaluated_network,
    make_evaluator,
    make_probe_builder,
    make_protocol,
)
from mpmc_jax.methods.base import Method
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import build_segmenter
from mpmc_jax.models.weights import convert as weights_lib
from mpmc_jax.models.weights import hub
from mpmc_jax.paths import as_path
from mpmc_jax.plugins.base import Identity, Plugin
from mpmc_jax.training import agreement
from mpmc_jax.training import workdir as workdir_lib
from mpmc_jax.training.checkpoint import manager as checkpoint_lib
from mpmc_jax.training.manifest import make_manifest
from mpmc_jax.training.state import variables_of
from mpmc_jax.types import PyTree

# One image: an array (h,w,c) as the data set stores it, or the path of a file.
Image = np.ndarray | str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run restored from its directory.

    Attributes:
      config: its configuration.
      facts: facts of the data set that it was trained on.
      model: configuration of its network.
      module: the segmenter.
      variables: {"params", "batch_stats"} of the network that is evaluated.
      step: the checkpoint's step.
      network_name: name of the network that is evaluated: "teacher" for the moving
        average, or a student's.
      plugin: its plug-in.
      probe: its patch classifier as training uses it, or None without MPMC.
      manifest: versions, devices, seed and data that the run recorded.
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

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Segments arrays; keeps what it compiled for later images."""
        protocol = make_protocol(self.config)
        return Predictor(self.module, self.variables, self.facts.pixels, protocol)

    @overload
    def predict(self, images: Image) -> np.ndarray: ...

    @overload
    def predict(self, images: list[Any]) -> list[np.ndarray]: ...

    def predict(self, images: Image | list[Any]) -> np.ndarray | list[np.ndarray]:
        """Segments images at their own size, by the run's protocol.

        Images of more than 4 million pixels are predicted in overlapping windows.

        Args:
          images: one image or a list of images, each an array (h,w,c) of the type
            that the data set stores (for most: RGB, uint8), or the path of a file.

        Returns:
          The class of every pixel, (h,w) uint8; for a list, a list of these.

        Raises:
          ValueError: an array of another shape or type, or an image that is too large.
          UnreadableImage, OSError: a file that cannot be read.
        """
        if isinstance(images, np.ndarray | str | os.PathLike):
            return self.predictor(_read_image(images, self.facts))
        return [self.predict(image) for image in images]

    def evaluate(
        self,
        split: str = "val",
        *,
        protocol: str = "",
        crop: int | None = None,
        scales: Sequence[float] = (),
        flip: bool = False,
        pad_to: int = 0,
    ) -> EvalResult:
        """Evaluates the run on a labeled split of its data set.

        Args:
          split: of the data set.
          protocol, crop, scales, flip, pad_to: see `with_protocol`.

        Raises:
          ValueError, FileNotFoundError: see `with_protocol` and `evaluate_split`.
        """
        options = {"protocol": protocol, "crop": crop, "scales": scales}
        run = with_protocol(self, **options, flip=flip, pad_to=pad_to)
        return evaluate_split(run, split)


def _read_image(image: Image, facts: DatasetFacts) -> np.ndarray:
    """Reads the pixels of one image as `facts.pixels` describes them.

    Raises:
      ValueError: an array of another shape or type.
    """
    pixels = facts.pixels
    if not isinstance(image, np.ndarray):
        return decode_array(Path(image).read_bytes(), pixels)
    channels = image.shape[2] if image.ndim == 3 else None
    if channels != pixels.channels or image.dtype != pixels.dtype:
        raise ValueError(
            f"an image of shape {image.shape} and type {image.dtype}; this run was "
            f"trained on {facts.dataset} and takes (height, width, {pixels.channels}) "
            f"of type {pixels.dtype}"
        )
    return image


def model_and_method(
    config: ml_collections.ConfigDict, facts: DatasetFacts, num_unlabeled: int
) -> tuple[ModelConfig, Method]:
    """Builds network configuration and base method of a run on a data set."""
    return build_base(
        config,
        num_classes=facts.num_classes,
        pixels=facts.pixels,
        num_unlabeled=num_unlabeled,
    )


def open_model_and_method(
    config: ml_collections.ConfigDict,
) -> tuple[DatasetFacts, ModelConfig, Method]:
    """Opens the prepared data set: its facts, network configuration and method."""
    info = dataset_info(config)
    unlabeled = len(build_split(config, info).unlabeled)
    return info.facts, *model_and_method(config, info.facts, unlabeled)


def load_run(workdir: str | os.PathLike[str], checkpoint: str | int = "best") -> Run:
    """Restores a run from its directory, or from the weights exported of it.

    The run may still be training. The checkpoint has the settings that determine the
    result, config.json all others. Sets JAX's default matmul precision to the run's.

    Args:
      workdir: the directory that the run was trained in, a .safetensors file that
        `launch.convert_weights` wrote of it, or hub:OWNER/NAME[/FILE][@REVISION].
      checkpoint: "best", "last" or a step; weights hold a single one.

    Raises:
      WorkdirError, CheckpointError, WeightsError, FileNotFoundError: something is
        missing; the message says how to fix it.
    """
    name = os.fspath(workdir)
    if name.startswith(hub.PREFIX) or name.endswith(".safetensors"):
        return _open_exported(name)
    workdir = as_path("workdir", name)
    directory = workdir / workdir_lib.CHECKPOINTS
    if not directory.is_dir():
        raise workdir_lib.WorkdirError(
            f"{workdir} holds no run: {directory} does not exist"
        )
    while True:
        try:
            run = _read_run(workdir, directory, str(checkpoint))
        except checkpoint_lib.CheckpointGoneError:
            run = None
        # The run is still training and may have replaced its best or last checkpoint.
        # Then all processes look again: they must read the same one.
        if distributed.all_agree(run is not None) and run is not None:
            return run


def _open_exported(name: str) -> Run:
    """Opens the weights exported of a run, see `load_run`; they have no plug-in."""
    path, where = hub.locate(name)
    if not where:
        path = as_path("workdir", name)
    weights = weights_lib.load(path)
    if not weights.run:
        raise weights_lib.WeightsError(
            f"{path} has weights, but not the data set and settings of a run, without "
            "which it does not predict; `python -m launch.convert_weights --input=RUN` "
            "writes both"
        )
    config = workdir_lib.load_exported(path, base_config.get_base(), weights.run)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    facts = DatasetFacts.read(weights.run["data"])
    model = model_config(config, facts.num_classes, facts.pixels.channels)
    return Run(
        config=config,
        facts=facts,
        model=model,
        module=build_segmenter(model),
        variables=weights.variables,
        step=weights.run["step"],
        network_name=weights.run["network"],
        plugin=Identity(),
        probe=None,
        manifest={"pretrained": {**weights.origin, **where}},
    )


def _read_run(workdir: Path, directory: Path, checkpoint: str) -> Run:
    """Restores a run, see `load_run`.

    Raises:
      CheckpointGoneError: the checkpoint was replaced while it was read.
    """
    step = checkpoint_lib.find(directory, checkpoint)
    trained_on = checkpoint_lib.read_run(directory, step)
    config = workdir_lib.load(workdir, base_config.get_base(), trained_on)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    facts = DatasetFacts.read(trained_on["data"])
    model, method = model_and_method(config, facts, trained_on["data"]["unlabeled"])
    setup = build_setup(
        config, model, method, steps_per_epoch=trained_on["steps_per_epoch"]
    )
    restored = checkpoint_lib.read(directory, step, state_shape(setup))
    check_network(config, setup)
    network = evaluated_network(config, setup, restored.state)
    return Run(
        config=config,
        facts=facts,
        model=model,
        module=setup.step.modules[network.student],
        variables=variables_of(
            restored.state, network.student, averaged=network.averaged
        ),
        step=restored.step,
        network_name=network.name,
        plugin=setup.step.plugin,
        probe=make_probe_builder(setup)(restored.state),
        manifest=workdir_lib.read_manifest(workdir, trained_on),
    )


def with_protocol(
    run: Run,
    *,
    protocol: str = "",
    crop: int | None = None,
    scales: Sequence[float] = (),
    flip: bool = False,
    pad_to: int = 0,
) -> Run:
    """Returns the run with another way to evaluate it.

    Error messages name the flags of launch.evaluate.

    Args:
      run: a run.
      protocol: one of `evaluation.protocols.PROTOCOLS`; "" for the run's own.
      crop: side of the protocol's windows; None for the run's own.
      scales: factors by which images are resized; () for the run's own.
      flip: whether to evaluate mirrored images too, even if the run's own does not.
      pad_to: pads whole images to multiples of this; 0 pads nothing. It is not taken
        from the run's configuration.

    Raises:
      ValueError: an unknown protocol, or an option that the protocol does not use.
    """
    config = copy.deepcopy(run.config)
    config.eval.pad_to = pad_to
    if protocol:
        config.eval.protocol = protocol
    if crop is not None:
        if crop < 1:
            raise ValueError(f"--crop={crop}: windows of at least 1 pixel are needed")
        config.data.crop = crop
    if scales:
        config.eval.scales = tuple(map(float, scales))
    if flip:
        config.eval.flip = True
    used = make_protocol(config)
    if pad_to and not used.whole_images:
        raise ValueError(
            f"--pad_to={pad_to} is for --protocol=whole; this is {used.name}"
        )
    if crop is not None and used.whole_images:
        raise ValueError(
            f"--crop={crop} is for protocols with windows; {used.name} takes images at "
            "their own size"
        )
    return dataclasses.replace(run, config=config)


def evaluate_split(run: Run, split: str) -> EvalResult:
    """Evaluates a run on one split, as its configuration says.

    Each of several processes evaluates a part of the images, and all get the result.

    Raises:
      ValueError, FileNotFoundError: a protocol or data set that does not fit; see
        `check_same` and `open_split`.
    """
    check_same(run, split)
    evaluator = make_evaluator(run.config, run.module, run.facts)
    return evaluator.run(run.variables, open_split(run, split), run.probe)


def evaluation_content(
    run: Run, split: str, checkpoint: str, result: EvalResult
) -> dict[str, Any]:
    """Makes the content of eval_*.json: scores, counts, settings and versions."""
    settings = run.config.eval
    return {
        "split": split,
        "partial": run.facts.partial,
        "protocol": result.protocol,
        "window": run.config.data.crop,
        "scales": list(settings.scales),
        "flip": settings.flip,
        "checkpoint": checkpoint,
        "step": run.step,
        "network": run.network_name,
        "pad_to": result.pad_to,
        "num_images": result.num_images,
        "trained_on": run.manifest.get("data", {}).get("fingerprint"),
        "seconds": result.seconds,
        "class_names": list(run.facts.class_names),
        "scalars": result.scalars(run.facts.class_names),
        "confusion": result.confusion.tolist(),
        "volumes": None if result.volumes is None else _volume_lists(result.volumes),
        "run": run.manifest,
        "manifest": make_manifest(
            run.config.seed,
            {
                "dataset": run.facts.dataset,
                "fingerprint": run.facts.fingerprint,
                "partial": run.facts.partial,
            },
        ),
    }


def _volume_lists(volumes: VolumeScores) -> list:
    """Lists scores by volume, class and kind; None where a score is undefined."""
    return [
        [[None if value != value else value for value in kinds] for kinds in classes]
        for classes in volumes.values.tolist()
    ]


def check_same(run: Run, split: str) -> None:
    """Compares what the processes of one evaluation are about to compute.

    Raises:
      SharedError: settings, checkpoint, data or versions differ; the message lists
        them.
      FileNotFoundError, ValueError: the run's data set does not exist.
    """
    if distributed.is_alone():
        return
    config = workdir_lib.flatten(run.config.to_dict())
    for name in workdir_lib.MAY_DIFFER_BETWEEN_PROCESSES:
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
    """Returns the run with its data set in another folder, or with another data set.

    Args:
      run: a run.
      data_dir: folder of prepared data sets; "" for the run's own.
      dataset: name of the data set; "" for the run's own.
      other: whether it is another data set than the run was trained on; its images are
        normalized like the run's.

    Raises:
      ValueError: another data set although `other` is false, or one with other classes
        or channels; the run's own although `other` is true.
      FileNotFoundError: no such data set.
    """
    config = copy.deepcopy(run.config)
    run = dataclasses.replace(run, config=config)
    if data_dir:
        config.data.data_dir = str(as_path("--data_dir", data_dir))
    if dataset not in ("", config.data.name) and not other:
        raise ValueError(
            f"--dataset={dataset}: the run was trained on {config.data.name!r}; "
            "--other_data evaluates it on another data set of the same classes"
        )
    config.data.name = dataset or config.data.name
    if not other:
        return run
    info = dataset_info(config)
    given = info.facts
    if given.fingerprint == run.facts.fingerprint:
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

    if different := _differences(shape(given), shape(run.facts)):
        raise ValueError(
            f"--other_data: {info.directory} does not fit the run: {different}"
        )
    facts = dataclasses.replace(given, pixels=run.facts.pixels)
    return dataclasses.replace(run, facts=facts)


def open_split(run: Run, split: str) -> EvalDataset:
    """Opens the labeled images of a split of the run's data set as it is now.

    Raises:
      FileNotFoundError, ValueError: see `EvalDataset`; or the folder holds other data
        than the run was trained on.
    """
    dataset = build_eval(run.config, split)
    names = ("dataset", "fingerprint", "class_names")
    found, wanted = (
        {name: getattr(facts, name) for name in names}
        for facts in (dataset.info.facts, run.facts)
    )
    if different := _differences(found, wanted):
        fix = "give the folder of the run's data as --data_dir"
        if found["class_names"] == wanted["class_names"]:
            fix += ", or evaluate the run on these: launch.evaluate --other_data"
        raise ValueError(
            f"{dataset.info.directory} holds other data than the run was trained on "
            f"({different}); {fix}"
        )
    return dataset


def _differences(found: dict[str, Any], run: dict[str, Any]) -> str:
    """Describes what differs between a data set and the run's; "" for nothing."""
    return "; ".join(
        f"{name} {found[name]} there, {run[name]} in the run"
        for name in run
        if found[name] != run[name]
    )
