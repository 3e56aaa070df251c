"""Table 4: change of mIoU by how well the patch classifier knows a patch."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, with_and_without

EXPERIMENT = Experiment(
    "Change of mIoU by the patch classifier's accuracy in a patch",
    "cityscapes",
    with_and_without("mean_teacher", "Mean teacher", backbone="resnet50"),
    fractions("1_16"),
    figure="table4",
)
