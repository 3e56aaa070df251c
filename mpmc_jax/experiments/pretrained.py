"""The weights that a run begins with, and those that are evaluated without a run."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections

from mpmc_jax.data.build import dataset_info
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import build_segmenter
from mpmc_jax.models.weights import convert as weights_lib
from mpmc_jax.plugins.base import Identity
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


def open_weights(
    path: pathlib.Path, configure: Callable[[str], ml_collections.ConfigDict]
) -> Run:
    """A whole network of a file, as a run without a plug-in that took no step.

    Args:
      path: of the file.
      configure: the base method that the network is of, "" if none is known -> the
        configuration that says how and on which data set it is evaluated.

    Raises:
      WeightsError, FileNotFoundError, ValueError: weights that are not there, are an
        encoder alone, or of another data set's classes or channels; no such data set.
    """
    weights = weights_lib.load(path)
    if not weights.whole:
        raise weights_lib.WeightsError(
            f"{path} holds an encoder, which tells no classes apart; begin a run with "
            "it: launch.train --config.model.pretrained"
        )
    deeplab = weights.model.name == "deeplabv3plus"
    config = configure(weights.model.variant if deeplab else "")
    facts = dataset_info(config).facts
    for what, given, there in (
        ("classes", weights.model.num_classes, facts.num_classes),
        ("channels", weights.model.in_channels, facts.pixels.channels),
    ):
        if given != there:
            raise weights_lib.WeightsError(
                f"{path} is of a network for {given} {what}, and {facts.dataset} has "
                f"{there}"
            )
    return Run(
        config=config,
        facts=facts,
        model=weights.model,
        module=build_segmenter(weights.model),
        variables=weights.variables,
        step=0,
        network_name=weights.origin["file"],
        plugin=Identity(),
        probe=None,
        manifest={"pretrained": weights.origin},
    )
