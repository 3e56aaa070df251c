"""The segmenters: halves, sizes, dtypes, statistics, bad configurations."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models import (
    ModelConfig,
    build_segmenter,
    dropout_channels,
    init_variables,
    perturbed_taps,
    tap_channels,
)
from mpmc_jax.models.preprocess import normalize, to_unit
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.types import Network
from tests.support import tiny
from tests.support.variables import random_variables

KEY = jax.random.key(0)
TINY = ModelConfig(backbone="resnet18", width=8, num_classes=5)
# One block a stage, where gradients or several programs are compiled.
SMALLEST = ModelConfig(backbone="tiny", width=8, num_classes=tiny.CLASSES)
TINY_BOTTLENECK = ModelConfig(variant="augseg", width=4, num_classes=3)


def setup(config=TINY, size=(33, 40), count=2):
    images = jax.random.normal(KEY, (count, *size, config.in_channels))
    return build_segmenter(config), random_variables(config), images


@partial(jax.jit, static_argnames=("module", "method", "until"))
def evaluate(module, variables, inputs, method="__call__", **kwargs):
    return module.apply(variables, inputs, method=method, **kwargs)


@partial(jax.jit, static_argnames=("module", "method", "until"))
def train(module, variables, inputs, method="__call__", **kwargs):
    return module.apply(
        variables, inputs, train=True, method=method, mutable=["batch_stats"], **kwargs
    )


@pytest.mark.parametrize("config", [TINY, TINY_BOTTLENECK])
@pytest.mark.parametrize("size", [(33, 40), (36, 17)])
def test_sizes_channels_and_strides(config, size):
    def run(key):
        module, variables, images = setup(config, size)
        encoded = module.apply(variables, images, method="encode")
        return encoded, module.apply(variables, images)

    features, prediction = jax.eval_shape(run, KEY)
    assert prediction.logits.shape == (2, *size, config.num_classes)
    assert features.size == size
    half = [-(-n // 2) for n in size]
    rounds_up = config.variant == "augseg"
    quarter = [-(-n // 2) + (rounds_up and n % 2 == 0) for n in half]
    assert features.taps["layer1"].shape[1:3] == tuple(quarter)
    for tap, map_bhwd in features.taps.items():
        assert map_bhwd.shape[-1] == tap_channels(config, tap), tap
    assert prediction.decoder.shape == (2, *quarter, tap_channels(config, "decoder"))
    layer3, layer4 = features.taps["layer3"], features.taps["layer4"]
    assert layer3.shape[:3] == layer4.shape[:3]


def test_halves_compose_to_the_whole():
    module, variables, images = setup()
    # Operation by operation: fused differently, two programs round differently.
    with jax.disable_jit():
        features = evaluate(module, variables, images, "encode")
        halves = evaluate(module, variables, features, "decode")
        whole = evaluate(module, variables, images)
    assert halves.logits.shape[1:3] == features.taps["layer1"].shape[1:3]
    upsampled = module.upsample(halves.logits, features.size)
    np.testing.assert_allclose(upsampled, whole.logits, atol=1e-6)
    np.testing.assert_allclose(halves.decoder, whole.decoder, atol=1e-5)


@pytest.mark.parametrize(
    "variant", ["u2pl", pytest.param("ael", marks=pytest.mark.full)]
)
def test_dropout_multiplies_the_maps_that_it_names(variant):
    config = dataclasses.replace(
        SMALLEST, variant=variant, embedding=variant == "u2pl", auxiliary=True
    )
    sites = dropout_channels(config)
    assert ("embed0" in sites) == config.embedding and "auxiliary0" in sites
    module, variables = build_segmenter(config), init_variables(KEY, config)
    images = jax.random.normal(KEY, (2, 33, 33, 3))

    @jax.jit
    def run(masks):
        network = Network(module, **variables)
        features, network = network.encode(images)
        return network.decode(features, masks)[0]

    masks = {name: jnp.ones((2, 1, 1, size)) for name, size in sites.items()}
    plain, kept = run({}), run(masks)
    chex.assert_trees_all_close(plain, kept, atol=1e-5)
    assert plain.auxiliary.shape == (2, 5, 5, config.num_classes)
    # Without its last map a head says its bias everywhere.
    last = {"logits": "fuse1", "embedding": "embed1", "auxiliary": "auxiliary0"}
    for head, site in last.items():
        if site in sites:
            dropped = run({**masks, site: masks[site].at[1].set(0)})
            found, before = getattr(dropped, head), getattr(plain, head)
            assert np.ptp(found[1], axis=(0, 1)).max() == 0
            np.testing.assert_allclose(found[0], before[0], atol=1e-5)
    with pytest.raises(ValueError, match="valid are .*fuse0"):
        run({"layer1": jnp.ones((2, 1, 1, 1))})


def test_the_decoder_reads_exactly_the_perturbed_taps():
    module, variables, images = setup()
    features = evaluate(module, variables, images, "encode")
    assert perturbed_taps(TINY) == {"layer1": 8, "layer4": 64}

    def total(features):
        return module.apply(variables, features, method="decode").logits.sum()

    gradients = jax.jit(jax.grad(total))(features).taps
    read = {tap for tap, gradient in gradients.items() if np.any(gradient)}
    assert read == set(perturbed_taps(TINY))


def test_encoding_until_a_tap_stops_there():
    module, variables, images = setup()

    def flops(until):
        encode = jax.jit(lambda v, x: module.apply(v, x, until=until, method="encode"))
        return encode.lower(variables, images).cost_analysis()["flops"]

    features, moved = train(module, variables, images, "encode", until="layer1")
    assert set(features.taps) == {"layer1"}
    assert flops("layer1") < 0.4 * flops(None)
    before, after = variables["batch_stats"], moved["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    changed = {
        unit
        for half in before
        for unit in before[half]
        if any(
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(before[half][unit]),
                jax.tree.leaves(after[half][unit]),
                strict=True,
            )
        )
    }
    assert changed == {"stem0", "layer1_0", "layer1_1"}


def test_encoding_until_nowhere_names_the_layers():
    module, variables, images = setup()
    with pytest.raises(ValueError, match="'layer9'.*layer1, layer2, layer3, layer4"):
        module.apply(variables, images, until="layer9", method=module.encode)


def test_bfloat16_computes_narrow_and_keeps_wide():
    config = dataclasses.replace(SMALLEST, dtype="bfloat16")
    module, variables, images = setup(config, count=8)  # of 2 pooled ones: their sign
    exact, _ = train(build_segmenter(SMALLEST), variables, images)

    def loss(params):
        prediction, moved = module.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(prediction.logits**2), (prediction, moved)

    gradient_fn = jax.jit(jax.grad(loss, has_aux=True))
    gradients, (prediction, moved) = gradient_fn(variables["params"])
    assert prediction.decoder.dtype == jnp.bfloat16
    assert prediction.logits.dtype == jnp.float32
    for leaf in jax.tree.leaves((variables["params"], moved, gradients)):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    error = np.abs(prediction.logits - exact.logits).mean() / np.std(exact.logits)
    assert 0 < error < 0.05


# Derived from the published implementations; their logs print 40.5M and 59.5M.
@pytest.mark.parametrize(
    ("backbone", "variant", "classes", "count"),
    [
        ("resnet50", "unimatch", 21, 40_475_957),
        ("resnet50", "unimatch", 19, 40_475_443),
        ("resnet101", "unimatch", 21, 59_468_085),
        ("resnet50", "augseg", 21, 40_475_957 + 48),
        ("resnet101", "augseg", 19, 59_467_571 + 48),
    ],
)
def test_parameter_counts_are_the_published_ones(backbone, variant, classes, count):
    config = ModelConfig(backbone=backbone, variant=variant, num_classes=classes)
    shapes = jax.eval_shape(lambda key: init_variables(key, config), KEY)
    assert set(shapes["params"]) == {"backbone", "decoder"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_initialization_depends_on_the_key_and_covers_every_unit():
    first, second = (init_variables(jax.random.key(i), TINY) for i in (0, 1))
    flat = jax.tree.leaves_with_path(first["params"])
    for (path, a), b in zip(flat, jax.tree.leaves(second["params"]), strict=True):
        is_kernel = path[-1].key == "kernel"
        assert np.any(a != b) == (is_kernel or "classifier" in str(path)), path


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "pspnet", "deeplabv3plus"),
        ("backbone", "resnet34", "resnet18, resnet50, resnet101"),
        ("variant", "other", "unimatch, augseg, u2pl, ael"),
        ("dtype", "float16", "float32, bfloat16"),
        ("num_classes", 0, ">= 1"),
        ("width", 6, "multiple of 4"),
    ],
)
def test_bad_configuration_names_the_field_and_the_valid_values(field, value, message):
    with pytest.raises(ValueError, match=f"model.{field}=.*{message}"):
        build_segmenter(ModelConfig(**{field: value}))


def test_unknown_tap_lists_the_taps():
    with pytest.raises(ValueError, match="layer1, layer2, layer3, layer4, decoder"):
        tap_channels(TINY, "layer5")


def test_preprocessing_centers_imagenet_colors_only():
    white = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    found = normalize(to_unit(white, RGB), RGB)[0, 0, 0]
    expected = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    gray = jnp.full((1, 1, 1, 1), 51, jnp.uint8)
    unit = to_unit(gray, GRAY)
    np.testing.assert_allclose(normalize(unit, GRAY), 0.2, rtol=1e-6)


def test_preprocessing_maps_the_range_of_deep_images_to_unit_values():
    pixels = PixelFormat(
        2, mean=(0.5, 0), std=(0.25, 1), dtype="uint16", low=(10, 0), high=(110, 4000)
    )
    deep = jnp.asarray([[[[60, 1000]]]], jnp.uint16)
    unit = to_unit(deep, pixels)
    np.testing.assert_allclose(unit, [[[[0.5, 0.25]]]], rtol=1e-6)
    np.testing.assert_allclose(normalize(unit, pixels), [[[[0, 0.25]]]], atol=1e-6)
    # Crops of deep images may come as bytes.
    np.testing.assert_allclose(
        to_unit(jnp.full((1, 1, 1, 2), 51, jnp.uint8), pixels), 0.2
    )
    with pytest.raises(ValueError, match="give one number for each of 2 channels"):
        PixelFormat(2, mean=(0, 0, 0), std=(1,))
