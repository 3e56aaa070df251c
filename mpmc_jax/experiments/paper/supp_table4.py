"""Supplement, Table 4: IoU of every class."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, with_and_without

EXPERIMENT = Experiment(
    "UniMatch with and without MPMC, class by class",
    "cityscapes",
    with_and_without("unimatch", "UniMatch", backbone="resnet101"),
    fractions("1_16"),
    per_class=True,
)
