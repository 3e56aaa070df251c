"""The U-Net: published numbers, taps, dropout, refusals; every method trains on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import synthetic
from mpmc_jax.models import (
    ModelConfig,
    build_segmenter,
    default_tap,
    init_variables,
    receptive_field,
)
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.types import Network
from tests.support import tiny

CONFIG = ModelConfig(name="unet", width=8, num_classes=4, in_channels=1)


def test_the_size_is_the_published_one():
    config = ModelConfig(name="unet", in_channels=1, num_classes=4)
    shapes = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == 1_813_764


def test_the_default_tap_has_stride_4():
    assert default_tap(CONFIG) == "stage3"
    assert receptive_field(CONFIG, "stage3") == ReceptiveField(32, 4, 14)
    with pytest.raises(ValueError, match="unet: valid are stage1, .*, decoder"):
        receptive_field(CONFIG, "layer1")


def test_dropout_follows_the_key_and_only_in_train_mode():
    variables = init_variables(jax.random.key(0), CONFIG)
    network = Network(build_segmenter(CONFIG), **variables)
    image = jnp.broadcast_to(
        jax.random.normal(jax.random.key(1), (1, 32, 32, 1)), (3, 32, 32, 1)
    )
    keys = jax.random.split(jax.random.key(2), 3)
    train = jax.jit(
        lambda k: network.replace(train=True).encode(image, dropout_keys=k)[0]
    )
    first = train(keys).taps["stage1"]
    turned = train(keys[::-1]).taps["stage1"]
    np.testing.assert_allclose(turned, first[::-1], rtol=1e-4, atol=1e-5)
    assert np.abs(first[0] - first[1]).max() > 0.01
    plain, _ = network.encode(image)
    noisy, _ = network.encode(image, dropout_keys=keys)
    np.testing.assert_array_equal(plain.taps["stage5"], noisy.taps["stage5"])


@pytest.mark.parametrize("channels", [1, 5])
def test_the_first_convolution_takes_the_images_channels(channels):
    for name, stem in (("unet", "stage1"), ("deeplabv3plus", "stem0")):
        config = ModelConfig(
            name=name, backbone="tiny", width=8, num_classes=4, in_channels=channels
        )
        initialize = functools.partial(init_variables, config=config)
        params = jax.eval_shape(initialize, jax.random.key(0))["params"]
        kernels = jax.tree.leaves_with_path(params["backbone"][stem])
        inputs = [x.shape[2] for _, x in kernels if x.ndim == 4]
        assert inputs[0] == channels


def test_dice_without_labels_is_not_for_all():
    config = tiny.config("method=augseg", method__unlabeled_loss="dice")
    message = r"unlabeled_loss='dice' is for mean_teacher, .*; augseg does not read it"
    with pytest.raises(ValueError, match=message):
        tiny.setup(config)


def test_images_that_do_not_halve_are_padded_and_crops_refused():
    module = build_segmenter(CONFIG)
    image = np.random.default_rng(0).normal(size=(1, 33, 48, 1)).astype(np.float32)
    variables = module.init(jax.random.key(0), image)
    repeated = image[:, [*range(33), *[32] * 15]]
    found = module.apply(variables, image).logits
    wanted = module.apply(variables, repeated).logits[:, :33]
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match=r"33x48 .* multiples of 16; set data.crop"):
        module.apply(variables, image, method="encode")
    with pytest.raises(ValueError, match="data.crop=321: the U-Net .* 320 and 336"):
        build_segmenter(dataclasses.replace(CONFIG, image_size=321))


# UniMatch's steps on it are in test_parity.py.
@pytest.mark.full
@pytest.mark.parametrize("method", ["mean_teacher", "augseg", "u2pl", "ael"])
def test_every_method_takes_a_step(method, monkeypatch):
    monkeypatch.setattr(tiny, "CROP", 32)
    config = synthetic.get_config(f"method={method},mpmc=recommended")
    config.data.crop = 32
    config.model.name = "unet"
    config.model.width = 16
    config.train.batch_size = 4
    config.train.group_size = 2
    config.train.steps = 20
    config.mpmc.tap = "auto"
    config.u2pl.warmup_epochs = 0
    config.method.supervised_loss = "ce_dice"
    _, (metrics,) = tiny.run(config, 1)
    assert np.isfinite(metrics.values["loss"])
    assert not metrics.skipped
