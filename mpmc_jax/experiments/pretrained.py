"""Weights from files: a run starts from them, or they are evaluated without a run."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections

from mpmc_jax.data.build import dataset_info
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.registry import build_segmenter, identifying_fields
from mpmc_jax.models.weights import convert as weights_lib
from mpmc_jax.models.weights import hub
from mpmc_jax.plugins.base import Identity
from mpmc_jax.text import quantity
from mpmc_jax.types import PyTree

_LOG = logging.getLogger("mpmc_jax.pretrained")

# Data sets whose published results start from ImageNet's weights.
_FROM_IMAGENET = ("voc", "cityscapes")


def initial_weights(
    config: ml_collections.ConfigDict, model: ModelConfig, networks: int = 1
) -> tuple[PyTree, dict[str, Any]]:
    """Reads the initial variables of networks, and their entry for the manifest.

    Both are empty without `model.pretrained`. Of a whole network, several networks get
    the encoder alone: equal ones would teach each other what each knows already, and
    stay equal.

    Args:
      config: the run's configuration.
      model: its networks.
      networks: how many networks are trained.

    Raises:
      WeightsError, FileNotFoundError: the file is missing, cannot be fetched or does
        not fit.
    """
    name = config.model.pretrained
    if not name:
        if config.data.name in _FROM_IMAGENET:
            _LOG.warning(
                "the network begins with random weights; published results on %s begin "
                "with ImageNet's: set --config.model.pretrained, see docs/weights.md",
                config.data.name,
            )
        return {}, {}
    path, where = hub.locate(name)
    weights = weights_lib.load(path)
    if weights.whole and networks > 1:
        weights = _encoder_alone(weights, name, config.method.name)
    start = weights_lib.fit(weights, model)
    part = "network" if weights.whole else "encoder"
    _LOG.info("the %s begins with %s", part, name)
    if start.adapted:
        _LOG.info(
            "its first convolution is adapted from %s to %d",
            quantity(weights.model.in_channels, "channel"),
            model.in_channels,
        )
    for units, text in (
        (start.fresh, "begin at random"),
        (start.unused, "stay unused"),
    ):
        if units:
            _LOG.warning("%s: %s", ", ".join(units), text)
    origin = {
        **weights.origin,
        **where,
        "part": part,
        "adapted": start.adapted,
        "fresh": list(start.fresh),
        "unused": list(start.unused),
    }
    return start.variables, origin


def open_weights(
    path: pathlib.Path, configure: Callable[[str], ml_collections.ConfigDict]
) -> Run:
    """Opens a whole network's file as a run of step 0 without a plug-in.

    Args:
      path: of the file.
      configure: makes the configuration of the evaluation, with its data set, from the
        name of the base method that the network belongs to ("" if unknown).

    Raises:
      WeightsError, FileNotFoundError, ValueError: the file is missing, holds
        an encoder alone, or fits another data set's classes or channels; or the data
        set is not prepared.
    """
    weights = weights_lib.load(path)
    if not weights.whole:
        raise weights_lib.WeightsError(
            f"{path} holds an encoder, which does not predict classes; begin a run "
            "with it: launch.train --config.model.pretrained"
        )
    has_variants = "variant" in identifying_fields(weights.model)
    config = configure(weights.model.variant if has_variants else "")
    # The encoder states how images are normalized.
    config.model.name = weights.model.name
    config.model.backbone = weights.model.backbone
    facts = dataset_info(config).facts
    for name, given, needed in (
        ("classes", weights.model.num_classes, facts.num_classes),
        ("channels", weights.model.in_channels, facts.pixels.channels),
    ):
        if given != needed:
            raise weights_lib.WeightsError(
                f"{path} is of a network for {given} {name}, and {facts.dataset} has "
                f"{needed}"
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


def _encoder_alone(
    weights: weights_lib.Weights, name: str, method: str
) -> weights_lib.Weights:
    """Leaves the decoder of a whole network out, and says why."""
    _LOG.warning(
        "%s has a whole network; method.name=%s takes its encoder alone: its networks "
        "must differ, so that their decoders begin at random",
        name,
        method,
    )
    return weights.encoder()
