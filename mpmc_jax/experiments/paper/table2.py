"""Table 2: Cityscapes."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, on_backbones

EXPERIMENT = Experiment(
    "Four methods with and without MPMC on Cityscapes",
    "cityscapes",
    on_backbones("resnet50", "resnet101", supervised=False),
    fractions("1_16", "1_8", "1_4", "1_2"),
)
