"""MPMC from a configuration, and what is refused."""

import pytest

from configs import base as configs
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins import Identity, build_plugin
from mpmc_jax.plugins.base import TapInfo
from mpmc_jax.plugins.mpmc import MPMC

CLASSES = 4
FIELD, SIZE = ReceptiveField(7, 4, 3), (5, 5)
TAP = TapInfo("layer1", FIELD, SIZE, crop=321, num_classes=CLASSES)


def _config(**overrides):
    config = configs.get_base()
    config.mpmc.enabled = True
    for key, value in overrides.items():
        config.mpmc[key] = value
    return config


def test_build_passes_every_key_on():
    changed = {"beta": 0.3, "windows": (1, 19), "head": "lite", "lambda_s": False}
    plugin = build_plugin(_config(**changed), TAP)
    assert isinstance(plugin, MPMC)
    assert {key: getattr(plugin, key) for key in changed} == changed
    assert plugin == MPMC(num_classes=CLASSES, field=FIELD, tap_size=SIZE, **changed)
    config = _config()
    config.mpmc.enabled = False
    assert build_plugin(config, TAP) == Identity()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("confidence", "entropy", "softmax_prob, softmax_logit, sigmoid"),
        ("lambda_scale", "sum", "none, max, mean"),
        ("target", "soften", "soft, hard"),
        ("teacher_head", "average", "student, ema"),
        ("head", "heavy", "paper, lite"),
        ("windows", (1, 5), r"\(1, 3, 7, 19\)"),
        ("windows", (), r"\(1, 3, 7, 19\)"),
        ("gate", 1.5, "give a probability, or 0 for no gate"),
    ],
)
def test_build_refuses_and_names_the_valid_values(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        build_plugin(_config(**{key: value}), TAP)
    assert f"mpmc.{key}" in str(error.value)


def test_build_warns_of_a_field_that_covers_the_crop(caplog):
    tap = TapInfo("layer1", ReceptiveField(39, 4, 19), (10, 10), 39, CLASSES)
    with caplog.at_level("WARNING"):
        build_plugin(_config(), tap)
    assert "covers the whole crop" in caplog.text
