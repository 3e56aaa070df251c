"""The synthetic scenes."""

import numpy as np

from mpmc_jax.data.builders import synthetic


def test_scenes_are_deterministic_and_hold_every_class():
    first = synthetic.draw_scene(0, 5, (160, 224))
    again = synthetic.draw_scene(0, 5, (160, 224))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (synthetic.draw_scene(1, 5, (160, 224))[1] != first[1]).any()
    shares = []
    for i in range(6):
        image, label = synthetic.draw_scene(0, i, synthetic.SIZES[i % 2])
        assert image.shape == (*synthetic.SIZES[i % 2], 3)
        assert (label[[0, -1]] == 255).all()
        counts = np.bincount(label.ravel(), minlength=256)
        assert not counts[len(synthetic.CLASSES) : 255].any()
        shares.append(counts[: len(synthetic.CLASSES)] / label.size)
    assert np.mean(shares, axis=0).min() > 0.005


def test_color_alone_does_not_tell_classes():
    """The nearest mean color, fitted on these very scenes, is often wrong."""
    pixels, labels = [], []
    for i in range(12):
        image, label = synthetic.draw_scene(0, i, (144, 208))
        pixels.append(image[label != 255].astype(float))
        labels.append(label[label != 255])
    pixels, labels = np.concatenate(pixels), np.concatenate(labels)
    means = [pixels[labels == c].mean(axis=0) for c in range(len(synthetic.CLASSES))]
    distance = np.stack([((pixels - m[None]) ** 2).sum(axis=1) for m in means])
    assert 0.2 < (distance.argmin(axis=0) == labels).mean() < 0.7
