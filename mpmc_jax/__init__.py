"""Semi-supervised semantic segmentation in JAX, with MPMC.

The names below are the library's public interface; everything else may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpmc_jax.evaluation import confusion_matrix, iou
from mpmc_jax.losses import (
    asymmetric_focal_loss,
    cross_entropy,
    ohem_cross_entropy,
)
from mpmc_jax.models import (
    ModelConfig,
    build_segmenter,
    load_torch_state_dict,
    receptive_field,
)
from mpmc_jax.plugins.mpmc import (
    adaptive_weights,
    multi_scale_pool,
    patch_targets,
)

if TYPE_CHECKING:
    from mpmc_jax.experiments.run import load_run
    from mpmc_jax.experiments.train import train

__version__ = "0.1.0"

__all__ = [
    "ModelConfig",
    "__version__",
    "adaptive_weights",
    "asymmetric_focal_loss",
    "build_segmenter",
    "confusion_matrix",
    "cross_entropy",
    "iou",
    "load_run",
    "load_torch_state_dict",
    "multi_scale_pool",
    "ohem_cross_entropy",
    "patch_targets",
    "receptive_field",
    "train",
]

# Imported at their first use: they bring in grain, Orbax and TensorBoard, which losses
# and networks do without.
_LAZY = {"load_run": "mpmc_jax.experiments.run", "train": "mpmc_jax.experiments.train"}


def __getattr__(name: str) -> Any:
    """Imports `load_run` or `train`."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
