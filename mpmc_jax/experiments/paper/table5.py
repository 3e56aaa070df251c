"""Table 5: MPMC on labeled images alone, by how many there are."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, with_and_without

EXPERIMENT = Experiment(
    "MPMC with labeled images alone",
    "cityscapes",
    with_and_without("supervised", "Supervised", backbone="resnet50"),
    fractions("1_16", "1_8", "1_4"),
)
