"""Class weights: given, or counted in the labels of the training images."""

import numpy as np
import pytest

from mpmc_jax.data import decode
from mpmc_jax.data.build import build_class_weights, build_split, dataset_info
from mpmc_jax.data.class_weights import balance
from tests.support.data_sets import config_for, prepare_synthetic


def test_balance_is_computed_by_hand():
    # Class 1 occurs in one of two images of 100 labeled pixels, class 2 nowhere.
    weights = balance(np.array([190, 10, 0, 40]), np.array([200, 100, 0, 200]))
    # Frequencies 0.95, 0.1, none and 0.2, whose median is 0.2.
    np.testing.assert_allclose(weights, (0.2 / 0.95, 2.0, 1.0, 1.0))


def test_frequencies_are_those_of_the_labeled_images_alone(tmp_path):
    prepare_synthetic(tmp_path)
    config = config_for(tmp_path, split="4")
    info = dataset_info(config)
    split = build_split(config, info)
    assert build_class_weights(config, split) == ()
    config.imbalance.class_weights = ("frequencies",)
    found = build_class_weights(config, split)
    records, classes = info.records("train"), info.facts.num_classes
    share = np.full(classes, np.nan)
    masks = [
        decode.record_label(records[i]["mask"])
        for i, key in enumerate(info.ids["train"])
        if key in split.labeled
    ]
    for c in range(classes):
        having = [mask for mask in masks if np.any(mask == c)]
        if having:
            labeled = sum(np.sum(mask < classes) for mask in having)
            share[c] = sum(np.sum(mask == c) for mask in having) / labeled
    expected = np.nan_to_num(np.nanmedian(share) / share, nan=1.0)
    np.testing.assert_allclose(found, expected)
    assert len(masks) == 4 and max(found) > 1 > min(found)


@pytest.mark.parametrize("given", [(1.0, 2.0), ("median",), (1, 2, "frequencies")])
def test_weights_that_fit_no_class_are_refused(tmp_path, given):
    prepare_synthetic(tmp_path, train=5, val=1)
    config = config_for(tmp_path)
    config.imbalance.class_weights = given
    split = build_split(config, dataset_info(config))
    with pytest.raises(ValueError, match="one number for each of the . classes"):
        build_class_weights(config, split)
    config.imbalance.class_weights = tuple(range(1, 10))
    assert build_class_weights(config, split) == tuple(map(float, range(1, 10)))
