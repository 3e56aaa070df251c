"""A second plug-in is one file and one line of the registry."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mpmc_jax.plugins import registry
from mpmc_jax.plugins.base import Plugin, PluginLosses
from tests.support import tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(Plugin):
    """Weighs every unlabeled pixel by `factor` and pulls a tap towards zero."""

    tap: str
    factor: float

    @property
    def taps(self):
        return (self.tap,)

    def init(self, key, taps):
        del key
        depth = taps[self.tap].shape[-1]
        return {"params": {"scale": jnp.ones(depth)}, "batch_stats": {}}

    def refine(self, variables, views, reduction, active):
        del variables, reduction, active
        return tuple(v.replace(weight=self.factor * v.weight) for v in views), {}

    def losses(self, variables, supervised, views, targets, reduction):
        del views, targets
        scaled = [
            jnp.square(
                part.taps[self.tap] * variables["params"]["scale"][None, None, None]
            )
            for part in supervised
        ]
        mean = sum(reduction.sum(x.mean()) for x in scaled)
        return PluginLosses({"shrink": 0.1 * mean}, {"shrink": (mean, 1)}, {})


def test_a_second_plugin_trains(monkeypatch):
    cfg = tiny.config("method=mean_teacher,mpmc=off", method__threshold=0.0)
    monkeypatch.setitem(
        registry.PLUGINS,
        "toy",
        lambda settings, tap: Shrink(tap=tap.name, factor=settings["factor"]),
    )
    with cfg.unlocked():
        cfg.toy = {"enabled": True, "factor": 0.5}
    assert isinstance(tiny.setup(cfg).step.plugin, Shrink)
    state, (metrics, _) = tiny.run(cfg, 2)
    values = metrics.values
    assert values["shrink"] > 0
    expected = values["loss_supervised"] + 0.1 * values["shrink"]
    # Every pixel counts, so that alone the method's weight would be alpha's.
    ramped = float(tiny.setup(cfg).step.alpha_at(jnp.asarray(0)))
    np.testing.assert_allclose(values["unlabeled_weight"], ramped / 2, rtol=1e-5)
    expected += ramped * values["loss_unlabeled"]
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    assert np.any(state.params["plugin"]["scale"] != 1)
