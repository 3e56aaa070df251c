"""Supplement, Table 1: all subsets of MPMC's three scales."""

import itertools

from mpmc_jax.experiments.paper.base import Choice, Experiment
from mpmc_jax.experiments.paper.rows import fractions

_WINDOWS = {1: "feature", 7: "7 x 7", 19: "19 x 19"}
_OFF = {"method": "augseg", "mpmc": "off", "backbone": "resnet50"}
_ROWS = {"off": Choice("AugSeg", _OFF)}
for _count in (1, 2, 3):
    for _chosen in itertools.combinations(_WINDOWS, _count):
        _ROWS["windows_" + "_".join(map(str, _chosen))] = Choice(
            ", ".join(_WINDOWS[window] for window in _chosen),
            {**_OFF, "mpmc": "paper"},
            {"mpmc.windows": _chosen},
            "off",
        )

EXPERIMENT = Experiment(
    "All subsets of MPMC's pooling scales, on AugSeg",
    "cityscapes",
    _ROWS,
    fractions("1_16"),
)
