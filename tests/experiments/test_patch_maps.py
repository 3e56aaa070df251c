"""The pixels that patches cover, where the patch classifier sees other images."""

import numpy as np

from mpmc_jax.evaluation.evaluator import PatchProbe
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.experiments.patch_maps import PatchClassifier
from mpmc_jax.models.receptive_field import ReceptiveField


def _arrays(size, protocol, field, patches, multiple=1):
    classifier = PatchClassifier(
        PatchProbe({}, None, multiple),
        build_protocol(protocol, 96),
        field,
        presence=lambda variables, images: np.zeros((1, *patches, 2)),
        weigh=None,
    )
    return classifier.classify(np.zeros((1, *size, 1))).arrays(0, size)


def test_patches_of_resized_slices_cover_all_of_the_slice():
    """A slice of 216 x 256 pixels, which the network sees as 96 x 96."""
    found = _arrays((216, 256), "volume", ReceptiveField(8, 8, 0), (12, 12))
    start = 18 * np.arange(12)
    np.testing.assert_array_equal(found["rows"], np.stack([start, start + 18], 1))
    assert found["columns"][:2].tolist() == [[0, 22], [21, 43]]
    assert found["columns"][-1].tolist() == [234, 256]


def test_patches_of_an_image_smaller_than_one_cover_it():
    found = _arrays((10, 40), "whole", ReceptiveField(16, 16, 0), (1, 2), multiple=16)
    assert found["rows"].tolist() == [[0, 10]]
    assert found["columns"].tolist() == [[0, 16], [16, 32]]


def test_patches_cover_no_pixel_that_the_encoder_does_not_see():
    field = ReceptiveField(20, 16, 2)
    found = _arrays((40, 48), "whole", field, (2, 3), multiple=16)
    assert found["rows"].tolist() == [[0, 18], [14, 32]]
    assert found["columns"].tolist() == [[0, 18], [14, 34], [30, 48]]
