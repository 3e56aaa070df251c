"""The metric that chooses the best checkpoint, by name."""

import dataclasses
import types

import pytest

from mpmc_jax.data.build import dataset_info
from mpmc_jax.experiments import evaluation
from mpmc_jax.plugins.base import Identity
from tests.support.data_sets import config_for, prepare_synthetic

NAMES = ["sky", "building", "road", "pavement", "tree", "car", "pole", "person", "sign"]


def _setup(*, classifies_patches=False):
    plugin = types.SimpleNamespace(classifies_patches=classifies_patches)
    return types.SimpleNamespace(step=types.SimpleNamespace(plugin=plugin))


def test_a_metric_is_the_protocols_or_one_by_name(tmp_path):
    assert not Identity().classifies_patches
    prepare_synthetic(tmp_path, train=5, val=4)
    config = config_for(tmp_path)
    info = dataset_info(config)
    facts = info.facts
    assert list(facts.class_names) == NAMES
    chosen = []
    for protocol, name in (
        ("whole", "auto"),
        ("volume", "auto"),
        ("whole", "iou/road"),
        ("whole", "pixel_accuracy"),
        ("volume", "dice/road"),
        ("whole", "patch_map"),
    ):
        config.eval.protocol, config.eval.best_metric = protocol, name
        setup = _setup(classifies_patches=name == "patch_map")
        chosen.append(evaluation.checked_best_metric(config, setup, facts))
    assert chosen == [
        "miou",
        "dice",
        "iou/road",
        "pixel_accuracy",
        "dice/road",
        "patch_map",
    ]
    config.eval.protocol = "whole"
    for wrong in ("iou/rode", "dice", "hd95", "patch_map", "loss"):
        config.eval.best_metric = wrong
        with pytest.raises(
            ValueError, match=f"'{wrong}' is unknown; valid: auto, miou"
        ):
            evaluation.checked_best_metric(config, _setup(), facts)


def test_a_class_that_no_validation_image_has_is_refused(tmp_path, monkeypatch):
    prepare_synthetic(tmp_path, train=5, val=4)
    config = config_for(tmp_path)
    info = dataset_info(config)
    road = NAMES.index("road")
    present = {k: tuple(set(v) - {road}) for k, v in info.present.items()}
    without = types.SimpleNamespace(info=dataclasses.replace(info, present=present))
    monkeypatch.setattr(evaluation, "build_eval", lambda config, split: without)
    config.eval.best_metric = "iou/road"
    with pytest.raises(ValueError, match="no validation image has the class 'road'"):
        evaluation.checked_best_metric(config, _setup(), info.facts)
    config.eval.best_metric = "iou/sky"
    assert evaluation.checked_best_metric(config, _setup(), info.facts) == "iou/sky"
