"""Checks of a configuration: names of keys, ranges of numbers, paths."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import ml_collections

from mpmc_jax.experiments import base_config
from mpmc_jax.models.registry import reads_drop_path
from mpmc_jax.models.weights import hub
from mpmc_jax.paths import as_path
from mpmc_jax.training import workdir

# JAX's keys have 32 bits: larger seeds would silently be reduced modulo 2 ** 32.
_SEEDS = ("seed", "data.split_seed")
# Steps, images and classes are counted in int32.
_INT32_MAX = 2**31 - 1
# Numbers whose sign nothing else checks, or only after a division by them.
_NOT_NEGATIVE = (
    "seed",
    "train.steps",
    "train.epochs",
    "data.split_seed",
    "method.auxiliary_weight",
    "imbalance.focal_gamma",
    "u2pl.warmup_epochs",
    "ael.scale",
    "train.precise_bn",
    "train.panels",
    "mpmc.alpha",
    "mpmc.beta",
    "mpmc.labeled_weight",
    "mpmc.gamma_pos",
    "mpmc.gamma_neg",
    "mpmc.warmup_epochs",
    "optimizer.lr",
    "optimizer.head_multiplier",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.power",
    "optimizer.lag",
)
_POSITIVE = (
    "data.prefetch",
    "data.scale_min",
    "data.scale_max",
    "model.width",
    "train.batch_size",
    "train.group_size",
    "train.accumulation",
    "mpmc.temperature",
    "u2pl.temperature",
    "optimizer.eps",
)


# The largest stride of an encoder: a smaller crop leaves less than one feature.
_LEAST_CROP = 16

# What presets set although it may not be read: CPS has one weight with CutMix, and one
# without.
_PRESET = {"cps.weight": 5.0, "cps.plain_weight": 6.0}

_PATHS = ("data_dir", "labeled_ids", "unlabeled_ids")


def expand_paths(config: ml_collections.ConfigDict) -> None:
    """Expands "~" in the settings that name files and folders.

    Raises:
      ValueError: see `as_path`.
    """
    for key in _PATHS:
        if text := config.data[key]:
            config.data[key] = str(as_path(f"--config.data.{key}", text))
    text = config.model.pretrained
    if text and hub.parse(text) is None:
        path = as_path("--config.model.pretrained", text)
        config.model.pretrained = str(path)


def check_keys(arguments: Sequence[str]) -> None:
    """Refuses an argument --config.a.b that names no key.

    Raises:
      ValueError: the message names the closest key, or the keys of the section.
    """
    valid = list(workdir.flatten(base_config.get_base().to_dict()))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--config.")
        if argument.startswith("--config.") and name not in valid:
            section, _, key = name.rpartition(".")
            near = {
                k.rpartition(".")[2]: k
                for k in valid
                if not section or k.startswith(f"{section}.")
            }
            # Without a section, or within one that exists, only the key is compared.
            close = difflib.get_close_matches(
                key if near else name, near or valid, n=1, cutoff=0.7
            )
            hint = f"did you mean {near.get(close[0], close[0])!r}? " if close else ""
            if (section and near) or not close:
                hint += f"valid: {', '.join(near.values() or valid)}"
            raise ValueError(f"unknown configuration key {name!r}; {hint}".rstrip())


def check_epochs(arguments: Sequence[str], config: ml_collections.ConfigDict) -> None:
    """Refuses --config.train.epochs where `train.steps` replaces it.

    Raises:
      ValueError: the configuration, or another argument, sets `train.steps`.
    """
    steps = config.train.steps
    names = [argument.partition("=")[0] for argument in arguments]
    if steps and "--config.train.epochs" in names:
        raise ValueError(
            f"--config.train.epochs does not act, because train.steps={steps} replaces "
            "it; leave it out, or add --config.train.steps=0"
        )


def check_ranges(config: ml_collections.ConfigDict) -> None:
    """Checks that numbers are finite, fit their types and have a valid sign.

    Raises:
      ValueError: the message lists the numbers that are not valid.
    """
    flat = workdir.flatten(config.to_dict())
    if errors := [text for key in flat for text in _range_errors(key, flat[key])]:
        raise ValueError("; ".join(errors))
    wrong = [f"{k}={flat[k]} must be positive" for k in _POSITIVE if not flat[k] > 0]
    wrong += [
        f"{k}={flat[k]} must not be negative" for k in _NOT_NEGATIVE if not flat[k] >= 0
    ]
    if config.data.crop < _LEAST_CROP:
        wrong.append(
            f"data.crop={config.data.crop}: crops need at least {_LEAST_CROP} pixels a "
            "side, the largest stride of the networks"
        )
    if config.data.threads < -1:
        wrong.append(
            f"data.threads={config.data.threads}: give a number of threads, 0 for "
            "none, or -1 for one per CPU"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def check_read(config: ml_collections.ConfigDict) -> None:
    """Checks that what was changed is read by something.

    A run that has begun is not asked: it keeps its settings.

    Raises:
      ValueError: the message lists the settings that nothing reads.
    """
    model, method, data = config.model, config.method, config.data
    unread = {}
    if "focal" not in method.supervised_loss.split("_"):
        unread["imbalance.focal_gamma"] = (
            f"method.supervised_loss={method.supervised_loss!r}"
        )
    if data.geometry == "acdc":
        crops = "the crops of data.geometry='acdc', which are whole images"
        for key in ("data.flip", "data.scale_min", "data.scale_max", "data.scale_base"):
            unread[key] = crops
    if not reads_drop_path(model.name, model.backbone):
        unread["model.drop_path"] = "a network without a vision transformer"
    if method.name == "cps":
        if not config.mpmc.enabled:
            unread["model.teacher_dtype"] = "CPS without MPMC, which has no teachers"
        key = "cps.plain_weight" if method.cutmix else "cps.weight"
        unread[key] = f"CPS with method.cutmix={method.cutmix}"
    given = workdir.flatten(config.to_dict())
    defaults = workdir.flatten(base_config.get_base().to_dict())
    wrong = [
        f"{key}={given[key]} does not act on {what}; leave it at {defaults[key]!r}"
        for key, what in unread.items()
        if given[key] not in (defaults[key], _PRESET.get(key))
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _range_errors(key: str, value: Any) -> list[str]:
    """Describes what is wrong with the numbers of a setting, except their sign."""
    found = []
    for number in value if isinstance(value, tuple | list) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            found.append(f"{key}={number} must be finite")
        elif isinstance(number, int) and key in _SEEDS:
            if number >= 2**32:
                found.append(f"{key}={number} must be less than 2 ** 32")
        elif isinstance(number, int) and abs(number) > _INT32_MAX:
            found.append(f"{key}={number} must lie within {_INT32_MAX} of 0")
    return found
