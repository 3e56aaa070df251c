"""Table 1: Pascal VOC, classic and blender lists."""

from mpmc_jax.experiments.paper.base import Choice, Experiment
from mpmc_jax.experiments.paper.rows import on_backbones

_CLASSIC = {
    f"classic_{count}": Choice(f"Classic {count}", {"split": count})
    for count in ("92", "183", "366", "732", "1464")
}
# U2PL's lists of the Blender set, at the crop of their published rows.
_BLENDER = {
    f"blender_{part}": Choice(
        f"Blender {part.replace('_', '/')}", {"split": f"u2pl_{part}", "crop": "513"}
    )
    for part in ("1_16", "1_8", "1_4")
}

EXPERIMENT = Experiment(
    "Four methods with and without MPMC on Pascal VOC",
    "voc",
    on_backbones("resnet50", "resnet101", supervised=True),
    _CLASSIC | _BLENDER,
    note="The columns are published lists of labeled images: name their folder with "
    "--lists, see docs/reproduce.md.",
)
