"""Rows and columns that several tables share."""

from mpmc_jax.experiments.paper.base import Choice, labeled_part

# The four methods that the paper adds MPMC to.
METHODS = {
    "augseg": "AugSeg",
    "ael": "AEL",
    "u2pl": "U2PL",
    "unimatch": "UniMatch",
}


def with_and_without(
    method: str, label: str, *, suffix: str = "", **argument: str
) -> dict[str, Choice]:
    """Returns the rows METHOD and METHOD_mpmc.

    Args:
      method: name of the method.
      label: its name in the table.
      suffix: what is added to both ids, such as "_resnet50".
      argument: further parts of the configuration's argument.
    """
    base = f"{method}{suffix}"
    given = {"method": method, **argument}
    return {
        base: Choice(label, {**given, "mpmc": "off"}),
        f"{method}_mpmc{suffix}": Choice(
            f"{label} + MPMC", {**given, "mpmc": "paper"}, baseline=base
        ),
    }


def on_backbones(*backbones: str, supervised: bool) -> dict[str, Choice]:
    """Returns the rows of all methods on each backbone, and those of supervision."""
    rows = {}
    for backbone in backbones:
        suffix, shown = f"_{backbone}", backbone.replace("resnet", "ResNet-")
        if supervised:
            argument = {"method": "supervised", "mpmc": "off", "backbone": backbone}
            rows[f"supervised{suffix}"] = Choice(f"Supervised, {shown}", argument)
        for method, label in METHODS.items():
            label = f"{label}, {shown}"
            rows |= with_and_without(method, label, suffix=suffix, backbone=backbone)
    return rows


def fractions(*splits: str) -> dict[str, Choice]:
    """Returns the columns of labeled parts such as "1_16"."""
    return {split: labeled_part(split) for split in splits}
