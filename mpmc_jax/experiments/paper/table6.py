"""Table 6: MPMC on labeled images, on unlabeled ones, and on both."""

from mpmc_jax.experiments.paper.base import Choice, Experiment
from mpmc_jax.experiments.paper.rows import fractions

_OFF = {"method": "mean_teacher", "mpmc": "off", "backbone": "resnet50"}
_ON = {**_OFF, "mpmc": "paper"}
_LABELED = {"mpmc.unlabeled": False, "mpmc.lambda_s": False}

EXPERIMENT = Experiment(
    "Parts of MPMC on the mean teacher",
    "cityscapes",
    {
        "off": Choice("Mean teacher", _OFF),
        "labeled": Choice("MPMC on labeled images", _ON, _LABELED, "off"),
        "unlabeled": Choice(
            "MPMC on unlabeled images", _ON, {"mpmc.detach": "labeled"}, "off"
        ),
        "both": Choice("MPMC on both", _ON, baseline="off"),
    },
    fractions("1_16", "1_8", "1_4"),
    note='"MPMC on unlabeled images": labels train the patch classifier, but not the '
    "network (D26).",
)
