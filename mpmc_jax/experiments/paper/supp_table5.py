"""Supplement, Table 5: the layer that the patch classifier reads."""

from mpmc_jax.experiments.paper.base import Choice, Experiment

_ARGUMENT = {"method": "unimatch", "mpmc": "paper", "backbone": "resnet101"}
_TAPS = {
    "layer1": "Encoder, layer 1",
    "layer2": "Encoder, layer 2",
    "layer3": "Encoder, layer 3",
    "layer4": "Encoder, layer 4",
    "decoder": "Decoder",
}

EXPERIMENT = Experiment(
    "The layer that the patch classifier reads",
    "voc",
    {tap: Choice(label, _ARGUMENT, {"mpmc.tap": tap}) for tap, label in _TAPS.items()},
    {"92": Choice("Classic 92", {"split": "92"})},
    note="The paper does not say which method and labels; its 77.3 at layer 1 is "
    "UniMatch + MPMC on ResNet-101 with 92 labels.",
)
