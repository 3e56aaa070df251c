"""MPMC: a multi-scale patch-based multi-label classifier (ECCV 2024)."""

from mpmc_jax.models.pooling import multi_scale_pool as multi_scale_pool
from mpmc_jax.plugins.mpmc.lambda_weights import adaptive_weights as adaptive_weights
from mpmc_jax.plugins.mpmc.patches import patch_targets as patch_targets
from mpmc_jax.plugins.mpmc.patches import real_patches as real_patches
from mpmc_jax.plugins.mpmc.plugin import MPMC as MPMC
from mpmc_jax.plugins.mpmc.plugin import build as build
