"""MPMC: a multi-scale patch-based multi-label classifier (ECCV 2024)."""

from mpmc_jax.plugins.mpmc.plugin import MPMC as MPMC
from mpmc_jax.plugins.mpmc.plugin import adaptive_weights as adaptive_weights
from mpmc_jax.plugins.mpmc.plugin import multi_scale_pool as multi_scale_pool
from mpmc_jax.plugins.mpmc.plugin import patch_targets as patch_targets
