"""The registry of base methods: name -> constructor from a configuration."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections

from mpmc_jax.methods.ael.method import AEL
from mpmc_jax.methods.augseg import AugSeg
from mpmc_jax.methods.base import Method
from mpmc_jax.methods.checks import check_choice
from mpmc_jax.methods.cps import CPS, PlainCPS
from mpmc_jax.methods.fixmatch import AverageFixMatch, FixMatch
from mpmc_jax.methods.mean_teacher import MeanTeacher
from mpmc_jax.methods.pseudo_labels import Threshold
from mpmc_jax.methods.supervised import SupervisedOnly
from mpmc_jax.methods.u2pl.contrast import PixelContrast
from mpmc_jax.methods.u2pl.method import U2PL
from mpmc_jax.methods.unimatch import UniMatch
from mpmc_jax.methods.unimatch_v2 import UniMatchV2
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import VIEW_LOSSES


@dataclasses.dataclass(frozen=True)
class MethodContext:
    """The properties of network, data and devices that methods depend on.

    Attributes:
      num_classes: number of classes, not counting void.
      num_unlabeled: number of images in the unlabeled list.
      pixels: the format of stored pixels.
      perturbed_taps: tap -> channels, of the encoder's outputs that the decoder reads.
      network_dropout: whether the network itself has dropout, see `Method`.
      dropout_channels: map of the decoder -> its channels, which U2PL and AEL drop.
      embedding: channels of the pixel embedding, 0 for a network without one.
      axis_name: the device axis, or None on a single device.
    """

    num_classes: int
    num_unlabeled: int
    pixels: PixelFormat
    perturbed_taps: Mapping[str, int]
    network_dropout: bool
    dropout_channels: Mapping[str, int]
    embedding: int
    axis_name: str | None


def _groups(config: ml_collections.ConfigDict) -> int:
    return max(config.train.batch_size // max(config.train.group_size, 1), 1)


def group_weights(config: ml_collections.ConfigDict) -> dict[str, float]:
    """Returns the method's weights whose default is 1 / (number of groups), by name.

    A larger batch would lower the default.
    """
    default, u2pl = 1 / _groups(config), config.u2pl
    if config.method.name == "ael":
        return {"ael.scale": config.ael.scale or default}
    if config.method.name == "u2pl" and u2pl.contrast == "released":
        given = u2pl.contrast_weight
        return {"u2pl.contrast_weight": default if given == -1 else given}
    return {}


def thresholds(config: ml_collections.ConfigDict) -> Threshold:
    """Returns the least confidence of a pseudo-label: for all classes, or one each."""
    return tuple(config.imbalance.thresholds) or config.method.threshold


def _supervised(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    del context
    return SupervisedOnly(ema_decay=config.method.ema_decay)


def _mean_teacher(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    del context
    return MeanTeacher(
        group_size=config.train.group_size,
        threshold=thresholds(config),
        ema_decay=config.method.ema_decay,
        cutmix=config.method.cutmix,
        loss=config.method.unlabeled_loss,
        normalization=config.method.normalization,
    )


def _unimatch(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    return UniMatch(
        perturbed_taps=tuple(context.perturbed_taps.items()),
        threshold=thresholds(config),
        ema_decay=config.method.ema_decay,
        loss=config.method.unlabeled_loss,
    )


def _unimatch_v2(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    return UniMatchV2(
        group_size=config.train.group_size,
        perturbed_taps=tuple(context.perturbed_taps.items()),
        threshold=thresholds(config),
        ema_decay=config.method.ema_decay,
        loss=config.method.unlabeled_loss,
    )


def _fixmatch(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    del context
    common = {
        "threshold": thresholds(config),
        "ema_decay": config.method.ema_decay,
        "loss": config.method.unlabeled_loss,
    }
    check_choice("fixmatch.teacher", config.fixmatch.teacher, ("student", "average"))
    if config.fixmatch.teacher == "student":
        return FixMatch(**common)
    return AverageFixMatch(group_size=config.train.group_size, **common)


def _cps(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    del context
    common = {
        "ema_decay": config.method.ema_decay,
        "loss": config.method.unlabeled_loss,
    }
    if config.method.cutmix:
        return CPS(weight=config.cps.weight, **common)
    return PlainCPS(weight=config.cps.plain_weight, **common)


def _augseg(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    del context
    return AugSeg(
        group_size=config.train.group_size,
        threshold=thresholds(config),
        ema_decay=config.method.ema_decay,
    )


def _u2pl(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    u2pl = config.u2pl
    pixel_contrast = PixelContrast(
        num_classes=context.num_classes,
        group_size=config.train.group_size,
        groups=_groups(config),
        channels=context.embedding,
        axis_name=context.axis_name,
        contrast=u2pl.contrast,
        contrast_weight=u2pl.contrast_weight,
        low_rank=u2pl.low_rank,
        high_rank=u2pl.high_rank,
        anchor_above=u2pl.anchor_above,
        key_below=u2pl.key_below,
        queries=u2pl.queries,
        negatives=u2pl.negatives,
        temperature=u2pl.temperature,
        bank_size=u2pl.bank_size,
        bank_size_first=u2pl.bank_size_first,
        bank_dtype=u2pl.bank_dtype,
    )
    return U2PL(
        group_size=config.train.group_size,
        pixel_contrast=pixel_contrast,
        dropout_channels=tuple(context.dropout_channels.items()),
        ema_decay=config.method.ema_decay,
        warmup_epochs=u2pl.warmup_epochs,
        kept_percent=u2pl.kept_percent,
        contrast_percent=u2pl.contrast_percent,
    )


def _ael(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    groups = _groups(config)
    ael = config.ael
    return AEL(
        num_classes=context.num_classes,
        num_unlabeled=context.num_unlabeled,
        group_size=config.train.group_size,
        groups=groups,
        dropout_channels=tuple(context.dropout_channels.items()),
        axis_name=context.axis_name,
        threshold=thresholds(config),
        ema_decay=config.method.ema_decay,
        query_classes=ael.query_classes,
        unqueried=ael.unqueried,
        object_area=ael.object_area,
        presence_area=ael.presence_area,
        delay=ael.delay,
        scale=group_weights(config)["ael.scale"],
    )


# Settings of the section `method` that some methods do not read, and their defaults.
_OPTIONAL = {"unlabeled_loss": "ce", "cutmix": True, "normalization": "joint"}
# Methods whose pseudo-labels do not depend on their confidence.
_WITHOUT_THRESHOLD = ("supervised", "u2pl", "cps")


class _Entry(NamedTuple):
    """A method's constructor and what else must be known of it.

    Attributes:
      make: the constructor.
      variant: the network variant that its authors used.
      reads: the keys of `_OPTIONAL` that it reads.
      embedding: whether it needs a pixel embedding.
    """

    make: Callable[[ml_collections.ConfigDict, MethodContext], Method]
    variant: str
    reads: tuple[str, ...] = ()
    embedding: bool = False


METHODS = {
    "supervised": _Entry(_supervised, "unimatch"),
    "mean_teacher": _Entry(_mean_teacher, "unimatch", reads=tuple(_OPTIONAL)),
    "unimatch": _Entry(_unimatch, "unimatch", reads=("unlabeled_loss",)),
    "unimatch_v2": _Entry(_unimatch_v2, "unimatch", reads=("unlabeled_loss",)),
    "fixmatch": _Entry(_fixmatch, "unimatch", reads=("unlabeled_loss",)),
    "cps": _Entry(_cps, "unimatch", reads=("unlabeled_loss", "cutmix")),
    "augseg": _Entry(_augseg, "augseg"),
    "u2pl": _Entry(_u2pl, "u2pl", embedding=True),
    "ael": _Entry(_ael, "ael"),
}


def network_needs(name: str) -> tuple[str, bool]:
    """The network variant of the method's authors, and whether it needs embeddings.

    Raises:
      ValueError: unknown method; the message lists the valid ones.
    """
    entry = _entry(name)
    return entry.variant, entry.embedding


def _entry(name: str) -> _Entry:
    if name not in METHODS:
        raise ValueError(f"method.name={name!r} is unknown; valid: {sorted(METHODS)}")
    return METHODS[name]


def build_method(config: ml_collections.ConfigDict, context: MethodContext) -> Method:
    """Builds the base method that `config.method.name` names.

    Raises:
      ValueError: unknown name, listing the valid ones, or a setting that the method
        cannot work with.
    """
    if config.method.threshold > 1:
        raise ValueError(
            f"method.threshold={config.method.threshold}: no probability reaches it; "
            "use at most 1, and 0 to let all pseudo-labels count"
        )
    entry = _entry(config.method.name)
    _check_optional(config)
    _check_thresholds(config, context.num_classes)
    method = entry.make(config, context)
    return dataclasses.replace(
        method, pixels=context.pixels, network_dropout=context.network_dropout
    )


def _check_thresholds(config: ml_collections.ConfigDict, num_classes: int) -> None:
    """Raises ValueError for thresholds by class that do not fit or are not read."""
    given, name = tuple(config.imbalance.thresholds), config.method.name
    if not given:
        return
    if name in _WITHOUT_THRESHOLD:
        raise ValueError(
            f"imbalance.thresholds={given}: {name} has no threshold of confidence; "
            "leave it at ()"
        )
    numbers = all(isinstance(each, (int, float)) for each in given)
    if len(given) != num_classes or not (numbers and all(0 <= t <= 1 for t in given)):
        raise ValueError(
            f"imbalance.thresholds={given}: give {num_classes} numbers in [0, 1], one "
            "per class, or () for method.threshold"
        )


def _check_optional(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a setting that the method does not read."""
    name, method = config.method.name, config.method
    for key, default in _OPTIONAL.items():
        if method[key] != default and key not in METHODS[name].reads:
            readers = [other for other, entry in METHODS.items() if key in entry.reads]
            raise ValueError(
                f"method.{key}={method[key]!r} is for {', '.join(readers)}; {name} "
                f"does not read it: leave it at {default!r}"
            )
    if method.unlabeled_loss not in VIEW_LOSSES:
        raise ValueError(
            f"method.unlabeled_loss={method.unlabeled_loss!r} is unknown: {name} takes "
            f"{', '.join(VIEW_LOSSES)}"
        )
    if name == "supervised" and method.rampup > 0:
        raise ValueError(
            f"method.rampup={method.rampup}: supervised has no unlabeled loss to ramp "
            "up; leave it at 0"
        )
