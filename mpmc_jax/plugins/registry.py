"""The plug-ins by name, and how the configuration chooses one."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mpmc_jax.plugins import mpmc
from mpmc_jax.plugins.base import Identity, Plugin, TapInfo

# Section of the configuration -> function that builds the plug-in from its values.
PLUGINS: dict[str, Callable[[dict[str, Any], TapInfo], Plugin]] = {"mpmc": mpmc.build}


def build_plugin(config: ConfigDict, tap: TapInfo) -> Plugin:
    """Builds the plug-in whose section is `enabled`, else `Identity`.

    Args:
      config: the whole configuration.
      tap: the tap that the setting `mpmc.tap` chooses, for every plug-in.

    Raises:
      ValueError: two plug-ins are enabled, or a value is outside its choices.
    """
    enabled = [name for name in PLUGINS if config[name].enabled]
    if len(enabled) > 1:
        raise ValueError(f"plug-ins {enabled} are enabled; a run has one, or none")
    for name in enabled:
        section = config[name]
        return PLUGINS[name]({key: section[key] for key in section}, tap)
    return Identity()
