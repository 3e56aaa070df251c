"""Plug-ins from the configuration."""

from absl import logging
from ml_collections import ConfigDict

from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.base import Identity, Plugin
from mpmc_jax.plugins.mpmc.lambda_weights import CONFIDENCES, SCALES
from mpmc_jax.plugins.mpmc.plugin import MPMC

_CHOICES: dict[str, tuple[str, ...]] = {
    "confidence": tuple(CONFIDENCES),
    "lambda_scale": SCALES,
    "target": ("soft", "hard"),
    "teacher_head": ("student", "ema"),
}


def build_plugin(
    config: ConfigDict,
    num_classes: int,
    field: ReceptiveField,
    tap_size: tuple[int, int],
    *,
    tap: str,
    axis_name: str | None = None,
) -> Plugin:
    """The plug-in of a run: MPMC where `mpmc.enabled`, else `Identity`.

    Args:
      config: the whole configuration; `mpmc`, and of the rest what MPMC depends on.
      num_classes: C.
      field: receptive field of the tap.
      tap_size: its rows and columns at `data.crop`.
      tap: `mpmc.tap`, with the architecture's for "auto".
      axis_name: device axis of batch norm.

    Raises:
      ValueError: on a value of `mpmc` outside its choices.
    """
    mpmc = config.mpmc
    if not mpmc.enabled:
        return Identity(alpha=mpmc.alpha)
    for key, valid in _CHOICES.items():
        if mpmc[key] not in valid:
            raise ValueError(f"mpmc.{key} is {mpmc[key]!r}; valid: {', '.join(valid)}")
    if field.size >= config.data.crop:
        logging.warning(
            "A patch of %s (%d pixels) covers the whole crop (%d): every patch holds "
            "the same classes.",
            tap,
            field.size,
            config.data.crop,
        )
    plugin = MPMC(
        num_classes=num_classes,
        field=field,
        tap_size=tap_size,
        axis_name=axis_name,
        width=config.model.width,
        tap=tap,
        **{key: mpmc[key] for key in mpmc if key not in ("enabled", "tap")},
    )
    plugin.classifier()  # refuses an unknown head or window before any work is done
    return plugin
