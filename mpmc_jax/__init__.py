"""Semi-supervised semantic segmentation in JAX, with MPMC.

The names below are the library's public interface; everything else may change.
"""

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
from mpmc_jax.plugins.mpmc.plugin import (
    adaptive_weights,
    multi_scale_pool,
    patch_targets,
)

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
    "load_torch_state_dict",
    "multi_scale_pool",
    "ohem_cross_entropy",
    "patch_targets",
    "receptive_field",
]
