"""Losses: pure functions of logits and targets."""

from mpmc_jax.losses.dice import dice_loss as dice_loss
from mpmc_jax.losses.lovasz import lovasz_softmax as lovasz_softmax
from mpmc_jax.losses.multilabel import asymmetric_focal_loss as asymmetric_focal_loss
from mpmc_jax.losses.multilabel import binary_cross_entropy as binary_cross_entropy
from mpmc_jax.losses.pixel import class_balance as class_balance
from mpmc_jax.losses.pixel import class_counts as class_counts
from mpmc_jax.losses.pixel import cross_entropy as cross_entropy
from mpmc_jax.losses.pixel import focal_loss as focal_loss
from mpmc_jax.losses.pixel import ohem_cross_entropy as ohem_cross_entropy
from mpmc_jax.losses.pixel import ohem_keep as ohem_keep
from mpmc_jax.losses.pixel import pixel_cross_entropy as pixel_cross_entropy
from mpmc_jax.losses.pixel import value_of_class as value_of_class
