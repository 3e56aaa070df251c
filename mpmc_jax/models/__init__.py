"""Segmentation networks, the patch classifier, and what is known about both."""

from mpmc_jax.models.config import ModelConfig
from mpmc_jax.models.patch_classifier import PatchClassifier
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.models.registry import (
    build_segmenter,
    default_tap,
    dropout_channels,
    has_dropout,
    init_variables,
    perturbed_taps,
    receptive_field,
    tap_channels,
    title,
)
from mpmc_jax.models.weights.torch_names import (
    load_torch_backbone,
    load_torch_state_dict,
)

__all__ = [
    "ModelConfig",
    "PatchClassifier",
    "ReceptiveField",
    "build_segmenter",
    "default_tap",
    "dropout_channels",
    "has_dropout",
    "init_variables",
    "load_torch_backbone",
    "load_torch_state_dict",
    "perturbed_taps",
    "receptive_field",
    "tap_channels",
    "title",
]
