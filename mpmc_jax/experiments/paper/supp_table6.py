"""Supplement, Table 6: a vision transformer, Segmenter on ViT-L."""

from mpmc_jax.experiments.paper.base import Experiment
from mpmc_jax.experiments.paper.rows import fractions, with_and_without

EXPERIMENT = Experiment(
    "AugSeg on Segmenter with ViT-L, with and without MPMC",
    "cityscapes",
    with_and_without("augseg", "AugSeg, Segmenter", backbone="vit_l16"),
    fractions("1_16", "1_8", "1_4", "1_2"),
    note="The paper names neither decoder nor optimizer, crop or weights. Here: the "
    "mask transformer and Segmenter's SGD (rate 0.001, no decay), with AugSeg's data, "
    "losses and schedule, at crop 800.",
)
