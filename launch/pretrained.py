"""The weights that a run begins with."""

import logging
import pathlib
from typing import Any

import ml_collections

from mpmc_jax.models import weights as weights_lib
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.types import PyTree

_LOG = logging.getLogger("mpmc_jax.pretrained")

# Data sets whose published results begin with ImageNet's weights.
_FROM_IMAGENET = ("voc", "cityscapes")


def read(
    config: ml_collections.ConfigDict, model: ModelConfig
) -> tuple[PyTree, dict[str, Any]]:
    """Variables that networks begin with, and what the manifest says of them.

    Without `model.pretrained` both are empty.

    Raises:
      WeightsError, FileNotFoundError: weights that are not there or do not fit.
    """
    name = config.model.pretrained
    if not name:
        if config.data.name in _FROM_IMAGENET:
            _LOG.warning(
                "the network begins with random weights; published results on %s begin "
                "with ImageNet's: set --config.model.pretrained=FILE",
                config.data.name,
            )
        return {}, {}
    weights = weights_lib.load(pathlib.Path(name))
    start = weights_lib.fit(weights, model)
    part = "network" if weights.whole else "encoder"
    _LOG.info("the %s begins with %s", part, name)
    if start.adapted:
        _LOG.info(
            "its first convolution is adapted from %d channels to %d",
            weights.model.in_channels,
            model.in_channels,
        )
    for units, text in (
        (start.fresh, "begin at random"),
        (start.unused, "stay unused"),
    ):
        if units:
            _LOG.warning("%s: %s", ", ".join(units), text)
    told = {
        **weights.origin,
        "part": part,
        "adapted": start.adapted,
        "fresh": list(start.fresh),
        "unused": list(start.unused),
    }
    return start.variables, told
