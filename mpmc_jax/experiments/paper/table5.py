"""Table 5: MPMC on labeled images alone, by how many there are."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, with_and_without

EXPERIMENT = Experiment(
    "MPMC with labeled images alone",
    "cityscapes",
    with_and_without("supervised", "Supervised", backbone="resnet101"),
    fractions("1_16", "1_8", "1_4"),
    note="The paper does not name the backbone; its baseline's 66.3, 72.8 and 75.0 are "
    "UniMatch's supervised baseline on ResNet-101.",
)
