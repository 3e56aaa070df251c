"""Table 3: ACDC."""

from mpmc_jax.experiments.paper.base import Choice, Experiment
from mpmc_jax.experiments.paper.rows import METHODS, with_and_without

_ROWS = {"supervised": Choice("Supervised", {"method": "supervised", "mpmc": "off"})}
for _method, _label in METHODS.items():
    _ROWS |= with_and_without(_method, _label)

EXPERIMENT = Experiment(
    "Four methods with and without MPMC on ACDC",
    "acdc",
    _ROWS,
    {count: Choice(f"{count} cases", {"split": count}) for count in ("3", "7")},
    note="Dice. The paper names DeepLabV3+ on ResNet-101 at 224 pixels; its UniMatch "
    "row is UniMatch's U-Net at 256, which runs here (D12).",
)
