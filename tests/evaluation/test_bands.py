"""Large images, predicted window by window, equal sliding-window evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Prediction

CLASSES = 3


class _Smooth:
    """Logits of a pixel depend on its row of the window; nothing is compiled slowly."""

    num_classes = CLASSES

    def apply(self, variables, images):
        weights = jnp.arange(3 * CLASSES, dtype=images.dtype).reshape(3, CLASSES)
        around = images + images.mean((1, 2), keepdims=True) * jnp.sin(
            jnp.arange(images.shape[1], dtype=images.dtype)
        ).reshape(1, -1, 1, 1)
        return Prediction(logits=around @ (weights - 4))


def _image(size=(61, 83)):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def _predictors(name, size, **options):
    protocol = build_protocol(name, size, **options)
    return (
        Predictor(_Smooth(), {}, RGB, protocol),
        Predictor(_Smooth(), {}, RGB, protocol, window_above=0),
    )


@pytest.mark.parametrize("name", ["slide_unimatch", "slide_u2pl", "slide_ael"])
@pytest.mark.parametrize("size", [7, 24, 61, 200])
def test_bands_equal_sliding_windows_over_the_whole_image(name, size):
    whole, banded = _predictors(name, size)
    image = _image()
    assert len(list(banded.bands(image))) == len(whole.protocol.spans(61))
    np.testing.assert_array_equal(banded(image), whole(image))
    np.testing.assert_allclose(
        banded.probabilities(image), whole.probabilities(image), atol=1e-6
    )


def test_whole_images_get_windows_above_a_size_alone():
    whole, banded = _predictors("whole", 20)
    assert not whole.uses_windows((2000, 2000))
    assert whole.uses_windows((2000, 2001))
    image = _image((600, 530))
    assert len(list(banded.bands(image))) == 2
    found = banded.probabilities(image)
    assert found.shape == (600, 530, CLASSES)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(banded(image), found.argmax(-1))
    # The upper left corner is in one window alone.
    corner = whole.probabilities(image[:512, :512])
    np.testing.assert_allclose(found[:80, :18], corner[:80, :18], atol=1e-6)


def test_slices_of_one_size_need_no_windows():
    _, predictor = _predictors("volume", 20)
    assert not predictor.uses_windows((9000, 9000))


def test_windows_are_seen_at_all_scales_and_flipped():
    _, banded = _predictors("slide_u2pl", 200, scales=(0.5, 1.0), flip=True)
    whole, _ = _predictors("whole", 200, scales=(0.5, 1.0), flip=True)
    np.testing.assert_allclose(
        banded.probabilities(_image()), whole.probabilities(_image()), atol=1e-6
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_variables_are_uploaded_once(monkeypatch, devices):
    """Not with each batch and window, as those on the host would be."""
    used = []

    class _Recording(_Smooth):
        def apply(self, variables, images):
            used.append(variables["params"])
            return super().apply(variables, images)

    monkeypatch.setattr("mpmc_jax.evaluation.predict.BoundedJit", lambda f: f)
    predictor = Predictor(
        _Recording(),
        {"params": np.ones(3)},
        RGB,
        build_protocol("whole", 20),
        devices=jax.local_devices()[:devices],
        window_above=0,
    )
    predictor(_image((8, 8)))
    predictor.with_variables({"params": np.zeros(3)})(_image((8, 8)))
    assert len(used) == 2
    assert all(isinstance(each, jax.Array) for each in used)


def test_a_batch_is_shared_by_devices_and_filled_up():
    protocol, image = build_protocol("whole", 20), _image()
    one = Predictor(_Smooth(), {}, RGB, protocol)
    many = Predictor(_Smooth(), {}, RGB, protocol, devices=jax.local_devices())
    images = np.stack([image, image[::-1], image[:, ::-1]])
    for predictor in (one, many):
        classes, scores = predictor.batch(images, probabilities=True)
        assert classes.shape == (3, 61, 83) and classes.dtype == np.uint8
        assert scores.shape == (3, 61, 83, CLASSES)
        for row, picture in enumerate(images):
            np.testing.assert_array_equal(classes[row], one(picture))
    assert one.rows_per_batch((1000, 1000), 16) == 4
    assert one.rows_per_batch((5000, 1000), 16) == 1
    assert many.rows_per_batch((10, 10), 16) == 16 * len(jax.local_devices())
