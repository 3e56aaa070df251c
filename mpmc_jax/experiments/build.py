"""Builds the parts of a run from the configuration and facts of the data set.

No image is read.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from mpmc_jax.methods.base import Method
from mpmc_jax.methods.registry import MethodContext, build_method, network_needs
from mpmc_jax.models import footprint
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import (
    build_segmenter,
    decoder_size_tap,
    default_tap,
    dropout_channels,
    has_dropout,
    init_variables,
    perturbed_taps,
    receptive_field,
    tap_channels,
)
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.plugins.base import Plugin, TapInfo
from mpmc_jax.plugins.per_network import per_network
from mpmc_jax.plugins.registry import build_plugin
from mpmc_jax.random_keys import key_of_name
from mpmc_jax.training import objective
from mpmc_jax.training.config import AXIS, METRICS_LAG, StepConfig
from mpmc_jax.training.optimizer import Schedule, build_optimizer
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.state import PLUGIN, TrainState
from mpmc_jax.types import Array, Network, PyTree


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts that training, evaluation, prediction and benchmarks share.

    Attributes:
      model: the network's configuration.
      step: the parts of the training step.
    """

    model: ModelConfig
    step: StepConfig


def model_config(
    config: ml_collections.ConfigDict, num_classes: int, channels: int
) -> ModelConfig:
    """Describes a run's network; "auto" becomes the variant of the method's authors."""
    variant, embedding = network_needs(config.method.name)
    if config.model.variant != "auto":
        variant = config.model.variant
    return ModelConfig(
        name=config.model.name,
        backbone=config.model.backbone,
        variant=variant,
        num_classes=num_classes,
        in_channels=channels,
        embedding=embedding,
        auxiliary=config.method.auxiliary_weight > 0,
        dtype=config.model.dtype,
        width=config.model.width,
        remat=config.model.remat,
        image_size=config.data.crop,
        freeze=config.model.freeze,
        drop_path=config.model.drop_path,
        attention=config.model.attention,
    )


def build_base(
    config: ml_collections.ConfigDict,
    *,
    num_classes: int,
    pixels: PixelFormat,
    num_unlabeled: int,
    axis_name: str | None = AXIS,
) -> tuple[ModelConfig, Method]:
    """Builds what the data pipeline depends on: network configuration and method.

    Raises:
      ValueError: an unknown name; the message lists the valid ones.
    """
    model = model_config(config, num_classes, pixels.channels)
    context = MethodContext(
        num_classes=num_classes,
        num_unlabeled=num_unlabeled,
        pixels=pixels,
        perturbed_taps=perturbed_taps(model),
        network_dropout=has_dropout(model),
        dropout_channels=dropout_channels(model),
        embedding=tap_channels(model, "decoder") if model.embedding else 0,
        axis_name=axis_name,
    )
    _check_group(config, context)
    return model, build_method(config, context)


def _check_group(config: ml_collections.ConfigDict, context: MethodContext) -> None:
    """Refuses a batch smaller than a group.

    Raises:
      ValueError: the message names the settings with which the method works.
    """
    batch, group = config.train.batch_size, config.train.group_size
    if not 0 < batch < group:
        return
    least, other = batch, copy.deepcopy(config)
    while least < group:
        other.train.batch_size = other.train.group_size = least
        # Methods that mix the images of a group refuse groups of a single image.
        with contextlib.suppress(ValueError):
            build_method(other, context)
            break
        least += 1
    fix = f"--config.train.group_size={least}"
    if least > batch:
        fix = f"--config.train.batch_size={least} {fix}"
    raise ValueError(
        f"train.batch_size={batch} is less than a group of train.group_size={group} "
        f"images; the least that {config.method.name} takes: {fix}"
    )


def build_setup(
    config: ml_collections.ConfigDict,
    model: ModelConfig,
    method: Method,
    *,
    steps_per_epoch: int,
    axis_name: str | None = AXIS,
    class_weights: tuple[float, ...] = (),
) -> Setup:
    """Builds the parts of a run.

    Args:
      config: the run's configuration.
      model, method: see `build_base`.
      steps_per_epoch: length of an epoch.
      axis_name: see `StepConfig`.
      class_weights: weights of the classes in the supervised loss, which only training
        needs; see `data.build.build_class_weights`.

    Raises:
      ValueError: an unknown name anywhere; the message lists the valid ones.
    """
    plugin = per_network(
        build_plugin(config, tap_info(config, model, axis_name)), method.networks
    )
    _check(config, method, plugin)
    teacher = dataclasses.replace(
        model, dtype=config.model.teacher_dtype or model.dtype
    )
    modules, teacher_modules = (
        {name: build_segmenter(each, axis_name=axis_name) for name in method.networks}
        for each in (model, teacher)
    )
    schedule = build_schedule(config, steps_per_epoch)
    step = StepConfig(
        method=method,
        plugin=plugin,
        modules=modules,
        teacher_modules=teacher_modules,
        optimizer=build_optimizer(
            schedule,
            name=config.optimizer.name,
            head_multiplier=config.optimizer.head_multiplier,
            weight_decay=config.optimizer.weight_decay,
            momentum=config.optimizer.momentum,
            betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps,
            freeze=config.model.freeze,
        ),
        schedule=schedule,
        supervised_loss=_build_supervised_loss(config, class_weights),
        batch_size=config.train.batch_size,
        group_size=config.train.group_size,
        micro_batches=config.train.accumulation,
        steps_per_epoch=steps_per_epoch,
        axis_name=axis_name,
        alpha=config.mpmc.alpha,
        rampup=rampup_steps(config, schedule.steps),
    )
    return Setup(model, step)


def _build_supervised_loss(
    config: ml_collections.ConfigDict, class_weights: tuple[float, ...]
) -> objective.SupervisedLoss:
    return objective.SupervisedLoss(
        name=config.method.supervised_loss,
        group_size=config.train.group_size,
        threshold=config.method.ohem_threshold,
        min_kept=config.method.ohem_min_kept,
        auxiliary_weight=config.method.auxiliary_weight,
        class_weights=class_weights,
        focal_gamma=config.imbalance.focal_gamma,
    )


def tap_info(
    config: ml_collections.ConfigDict, model: ModelConfig, axis_name: str | None
) -> TapInfo:
    """Describes the tap that plug-ins read, at the training crop."""
    tap = default_tap(model) if config.mpmc.tap == "auto" else config.mpmc.tap
    return TapInfo(
        name=tap,
        field=receptive_field(model, tap),
        size=tap_size(model, tap, config.data.crop),
        crop=config.data.crop,
        num_classes=model.num_classes,
        width=config.model.width,
        axis_name=axis_name,
    )


def _check(config: ml_collections.ConfigDict, method: Method, plugin: Plugin) -> None:
    """Raises ValueError where method, plug-in and loop do not fit each other."""
    if plugin.teacher_head == "ema" and not averages(method):
        raise ValueError(
            f"mpmc.teacher_head='ema', but method.name={config.method.name!r} keeps no "
            "average; use 'student', or a method and method.ema_decay that make one"
        )
    if method.streams.partner == "requested" and method.delay <= METRICS_LAG:
        raise ValueError(
            f"ael.delay={method.delay}: the loop reads a step's metrics {METRICS_LAG} "
            f"steps later, so at least {METRICS_LAG + 1} is needed"
        )


def build_parallel(config: ml_collections.ConfigDict) -> Parallel:
    """Builds the devices of a run and how its batches divide over them.

    Raises:
      ValueError: unknown kind, too many devices, or a batch that does not divide.
    """
    train = config.train
    layout = Layout(train.batch_size, train.group_size, train.accumulation)
    return Parallel(train.parallel, layout, train.devices)


def check_memory(
    config: ml_collections.ConfigDict, setup: Setup, devices: int, available: int
) -> None:
    """Refuses a step that a device cannot hold, from shapes alone.

    It computes a lower bound, so that nothing that fits is refused.

    Args:
      config: configuration of the run.
      setup: parts of the run.
      devices: number of devices over which the batch is spread.
      available: bytes of memory per device.

    Raises:
      ValueError: the message has the bytes, and the settings that lower them.
    """
    crop, step = config.data.crop, setup.step
    sizes = setup.step.method.streams.sizes(step.batch_size, step.group_size)
    images = (sizes["labeled"] + sizes.get("unlabeled", 0)) * len(step.modules)
    images = max(images // step.micro_batches // devices, 1)
    least = footprint.training_bytes(
        setup.model, images, crop, recomputes=jax.default_backend() != "cpu"
    )
    if least > available:
        raise ValueError(
            f"a step needs more than {least / 1e9:.3g} GB of memory for the network on "
            f"{images} images of {crop} x {crop} pixels, and a device has "
            f"{available / 1e9:.3g} GB free; lower data.crop, train.batch_size or "
            "model.width, raise train.accumulation, or set model.remat=all or "
            "model.dtype=bfloat16"
        )
    rows, columns = tap_size(setup.model, "decoder", crop)
    at_once = step.batch_size // step.group_size // step.micro_batches // devices
    needs = setup.step.method.memory(crop**2, rows * columns, max(at_once, 1))
    total = sum(needs.values())
    if total > available:
        parts = [
            f"{size / 1e9:.2f} GB by {key}"
            for key, size in needs.items()
            if size > total / 100
        ]
        raise ValueError(
            f"besides the network the method needs {total / 1e9:.2f} GB "
            f"on a device of {available / 1e9:.2f} GB: {', '.join(parts)}; lower these"
        )


def averages(method: Method) -> bool:
    """Whether the method keeps a moving average of its networks."""
    return method.average_decays(jnp.zeros((), jnp.int32), 1) is not None


def build_schedule(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Schedule:
    """Builds the learning-rate schedule of a run of `total_steps`."""
    return Schedule(
        lr=config.optimizer.lr,
        steps=total_steps(config, steps_per_epoch),
        power=config.optimizer.power,
        lag=config.optimizer.lag,
    )


def total_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
    """Returns the length of the run in steps."""
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    if steps < 1:
        raise ValueError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs} "
            "make no step; set one of them"
        )
    return steps


def rampup_steps(config: ml_collections.ConfigDict, steps: int) -> int:
    """Returns over how many steps the weight of L_u grows in a run of `steps` steps.

    Raises:
      ValueError: more than the run has, or a negative number other than -1.
    """
    rampup = config.method.rampup
    if rampup == -1:
        return steps // 10
    if not 0 <= rampup <= steps:
        raise ValueError(
            f"method.rampup={rampup}: 0 (none) to the {steps} steps of the run, or -1 "
            "for a tenth of them"
        )
    return rampup


def init_state(setup: Setup, seed: int) -> TrainState:
    """Makes the state at step 0, on one device."""
    # Runs once, so it is compiled without optimization: compiling takes a third of the
    # time.
    options = {"xla_backend_optimization_level": 0}
    return _init(setup, seed, functools.partial(jax.jit, compiler_options=options))


def state_shape(setup: Setup) -> TrainState:
    """Returns the shapes and types of a state, for restoring one."""
    return jax.eval_shape(lambda: _init(setup, 0, jax.jit))


def _init(setup: Setup, seed: int, jit: Callable[..., Callable]) -> TrainState:
    """Makes a state; every network has a key of its own, by its name.

    Compiled by itself, a network's initialization is one program for all methods,
    plug-ins and seeds.
    """
    key, method = jax.random.key(seed), setup.step.method
    init_network = jit(init_variables, static_argnums=1)

    def init_networks(prefix: str) -> tuple[PyTree, PyTree]:
        networks = {
            name: init_network(key_of_name(key, f"{prefix}/{name}"), setup.model)
            for name in method.networks
        }
        return (
            {name: v["params"] for name, v in networks.items()},
            {name: v["batch_stats"] for name, v in networks.items()},
        )

    params, stats = init_networks("init")
    ema_params, ema_stats = params, stats
    if method.independent_teacher_init():
        ema_params, ema_stats = init_networks("init/teacher")
        for name, teacher in ema_params.items():
            # Published runs read both backbones from one file.
            teacher["backbone"] = params[name]["backbone"]
    plugin_key = key_of_name(key, "init/plugin")
    head = jit(setup.step.plugin.init)(plugin_key, _example_taps(setup))
    if head:
        params[PLUGIN], stats[PLUGIN] = head["params"], head["batch_stats"]
        ema_params = {**ema_params, PLUGIN: head["params"]}
        ema_stats = {**ema_stats, PLUGIN: head["batch_stats"]}
    averaged = averages(method)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=stats,
        ema_params=ema_params if averaged else None,
        ema_batch_stats=ema_stats if averaged else None,
        opt_state=jit(setup.step.optimizer.init)(params),
        method_state=jit(method.init)(key_of_name(key, "init/method")),
        key=jax.random.key_data(key),
    )


def _example_taps(setup: Setup) -> dict[str, Array]:
    return {
        tap: jnp.zeros((1, 8, 8, tap_channels(setup.model, tap)))
        for tap in setup.step.plugin.taps
    }


@functools.cache
def tap_size(model: ModelConfig, tap: str, crop: int) -> tuple[int, int]:
    """Computes rows and columns of a tap at a square crop."""
    module = build_segmenter(model)
    images = jax.ShapeDtypeStruct((1, crop, crop, model.in_channels), jnp.float32)
    variables = jax.eval_shape(lambda k: init_variables(k, model), jax.random.key(0))
    # Without the decoder, whose matrices for resizing are as large as the crop.
    if tap == "decoder":
        tap = decoder_size_tap(model)

    def read(variables: PyTree, images: Array) -> Array:
        network = Network(module, variables["params"], variables["batch_stats"])
        return network.tap_map(images, tap)

    return jax.eval_shape(read, variables, images).shape[1:3]
