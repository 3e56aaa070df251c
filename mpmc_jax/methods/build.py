"""The registry of base methods: name -> constructor from a configuration."""

import ml_collections

from mpmc_jax.methods.augseg import AugSeg
from mpmc_jax.methods.base import Method
from mpmc_jax.methods.mean_teacher import MeanTeacher
from mpmc_jax.methods.supervised import SupervisedOnly
from mpmc_jax.methods.unimatch import UniMatch


def _supervised(config: ml_collections.ConfigDict, perturbed: dict[str, int]) -> Method:
    del perturbed
    return SupervisedOnly(ema_decay=config.method.ema_decay)


def _mean_teacher(
    config: ml_collections.ConfigDict, perturbed: dict[str, int]
) -> Method:
    del perturbed
    return MeanTeacher(
        group_size=config.train.group_size,
        threshold=config.method.threshold,
        ema_decay=config.method.ema_decay,
        cutmix=config.method.cutmix,
    )


def _unimatch(config: ml_collections.ConfigDict, perturbed: dict[str, int]) -> Method:
    return UniMatch(
        perturbed=tuple(perturbed.items()),
        threshold=config.method.threshold,
        ema_decay=config.method.ema_decay,
    )


def _augseg(config: ml_collections.ConfigDict, perturbed: dict[str, int]) -> Method:
    del perturbed
    return AugSeg(
        group_size=config.train.group_size,
        threshold=config.method.threshold,
        ema_decay=config.method.ema_decay,
    )


# name -> constructor, and the variant of the network that its authors used.
METHODS = {
    "supervised": (_supervised, "unimatch"),
    "mean_teacher": (_mean_teacher, "unimatch"),
    "unimatch": (_unimatch, "unimatch"),
    "augseg": (_augseg, "augseg"),
}


def default_variant(name: str) -> str:
    """The network variant of the method's authors.

    Raises:
      ValueError: unknown method; the message lists the valid ones.
    """
    return _entry(name)[1]


def _entry(name: str):
    if name not in METHODS:
        raise ValueError(f"method.name={name!r} is unknown; valid: {sorted(METHODS)}")
    return METHODS[name]


def build_method(
    config: ml_collections.ConfigDict, perturbed: dict[str, int]
) -> Method:
    """The base method that `config.method.name` names.

    Args:
      config: the whole configuration.
      perturbed: tap -> channels of the encoder outputs that the decoder reads.

    Raises:
      ValueError: unknown name, listing the valid ones, or a setting that the method
        cannot work with.
    """
    constructor, _ = _entry(config.method.name)
    return constructor(config, perturbed)
