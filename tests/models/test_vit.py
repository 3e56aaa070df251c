"""Vision transformers and their decoders against NumPy, published sizes, refusals."""

import dataclasses
import functools
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.experiments.build import state_shape
from mpmc_jax.experiments.evaluation import make_probe_builder
from mpmc_jax.methods.registry import METHODS
from mpmc_jax.models import (
    ModelConfig,
    ReceptiveField,
    build_segmenter,
    default_tap,
    init_variables,
    receptive_field,
    registry,
)
from mpmc_jax.models.encoders import vit
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.models.transformer import Block, Dense
from mpmc_jax.types import Network
from tests.support import tiny, vit_oracle
from tests.support.variables import random_like, random_variables
from tests.support.x64 import call_x64

DPT = ModelConfig(name="dpt", backbone="tiny_dinov2", width=8, num_classes=3)
SEGMENTER = ModelConfig(
    name="segmenter", backbone="tiny_vit", width=8, num_classes=3, image_size=40
)
LINEAR = dataclasses.replace(SEGMENTER, name="segmenter_linear")
DECODERS = {
    "dpt": lambda p, taps: vit_oracle.dpt(p, taps),
    "segmenter": lambda p, taps: vit_oracle.mask_transformer(p, taps[-1], 2),
    "segmenter_linear": lambda p, taps: vit_oracle.dense(p["classifier"], taps[-1]),
}


def _shapes(config):
    return jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# DINOv2's published counts contain the unused mask token (d), and those of the DPT head
# the unused second unit of the deepest fusion: two convolutions of f channels.
@pytest.mark.parametrize(
    ("size", "d", "f", "encoder", "head"),
    [
        ("s", 384, 64, 22_056_576, 2_739_061),
        ("b", 768, 128, 86_580_480, 10_948_309),
        ("l", 1024, 256, 304_368_640, 31_210_517),
    ],
)
def test_unimatch_v2s_networks_have_the_published_size(size, d, f, encoder, head):
    config = ModelConfig(name="dpt", backbone=f"dinov2_{size}14", num_classes=21)
    params = _shapes(config)["params"]
    assert _count(params["backbone"]) == encoder - d
    assert _count(params["decoder"]) == head - 2 * (9 * f * f + f)
    assert _shapes(config)["batch_stats"] == {}


@pytest.mark.parametrize(
    ("size", "d", "depth"), [("s", 384, 12), ("b", 768, 12), ("l", 1024, 24)]
)
def test_segmenters_networks_have_the_published_size(size, d, depth):
    block, grid, classes = 12 * d**2 + 13 * d, 512 // 16, 150
    config = ModelConfig(
        name="segmenter",
        backbone=f"vit_{size}16",
        num_classes=classes,
        image_size=512,
    )
    params = _shapes(config)["params"]
    embed = 16 * 16 * 3 * d + d
    encoder = embed + d + (1 + grid**2) * d + depth * block + 2 * d
    assert _count(params["backbone"]) == encoder
    mask = d**2 + d + classes * d + 2 * d**2 + 2 * block + 2 * d + 2 * classes
    assert _count(params["decoder"]) == mask
    linear = dataclasses.replace(config, name="segmenter_linear")
    assert _count(_shapes(linear)["params"]["decoder"]) == d * classes + classes


def worst_errors(name):
    """Largest differences of taps and of logits to NumPy, on a rectangle."""
    config = {c.name: c for c in (DPT, SEGMENTER, LINEAR)}[name]
    spec = vit.BACKBONES[config.backbone]
    values = jax.tree.map(lambda x: x.astype(float), random_variables(config, seed=3))
    variables, params = jax.tree.map(jnp.asarray, values), values["params"]
    image = np.random.default_rng(0).normal(size=(1, 24, 48, 3))
    module = build_segmenter(config)
    apply = jax.jit(module.apply, static_argnames="method")
    features = apply(variables, image, method="encode")
    prediction = apply(variables, features, method="decode")
    full = apply(variables, image).logits
    taps = vit_oracle.encoder(
        params["backbone"],
        image[0],
        patch=8,
        heads=2,
        depth=4,
        epsilon=spec.family.epsilon,
        offset=spec.family.offset,
    )
    logits = DECODERS[name](params["decoder"], taps)
    whole = vit_oracle.bilinear(logits, (24, 48), align_corners=name == "dpt")
    found = [*features.taps.values(), prediction.logits, full]
    return [
        float(np.abs(a[0] - b).max() / max(np.abs(b).max(), 1))
        for a, b in zip(found, [*taps, logits, whole], strict=True)
    ]


@pytest.mark.parametrize("name", list(DECODERS))
def test_networks_agree_with_numpy(name):
    assert max(worst_errors(name)) < 1e-4
    errors = call_x64("tests.models.test_vit", f"worst_errors({name!r})")
    assert len(errors) == 6 and max(errors) < 1e-9


@pytest.mark.parametrize("size", [(37, 37), (57, 57), (36, 27), (10, 23)])
@pytest.mark.parametrize("offset", [0.1, None])
def test_positions_are_resized_as_published(size, offset):
    position = np.random.default_rng(0).normal(size=(1, 1 + 37**2, 2))
    found = vit.resize_position(jnp.asarray(position, jnp.float32), size, offset)
    wanted = vit_oracle.positions(position[0], size, offset)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)
    if size == (37, 37):
        np.testing.assert_array_equal(found[0], position[0].astype(np.float32))


def test_a_token_sees_its_patch_and_the_first_level_is_the_tap():
    config = ModelConfig(name="dpt", backbone="dinov2_l14")
    assert default_tap(config) == "block4"
    for tap in ("block0", "block23"):
        assert receptive_field(config, tap) == ReceptiveField(14, 14, 0)
    config = ModelConfig(name="segmenter", backbone="vit_s16")
    for tap in ("block2", "decoder"):
        assert receptive_field(config, tap) == ReceptiveField(16, 16, 0)
    with pytest.raises(
        ValueError, match="tap 'block12' .* are block0, block1, .*11, d"
    ):
        receptive_field(config, "block12")
    # Four positions of the fused map in every seven pixels; the first one is centered
    # on the first patch.
    config = ModelConfig(name="dpt", backbone="dinov2_s14")
    field = receptive_field(config, "decoder")
    assert field == ReceptiveField(418, Fraction(7, 4), 202)
    assert (field.size - 1) / 2 - field.padding == 6.5


def _gradient(config, keys=None):
    module, variables = build_segmenter(config), random_variables(config)
    images = jax.random.normal(jax.random.key(1), (2, 40, 40, 3))

    def loss(params):
        network = Network(module, params, {}, train=True)
        features, network = network.encode(images, dropout_keys=keys)
        prediction, _ = network.decode(features)
        return jnp.mean(prediction.logits**2)

    return jax.jit(jax.grad(loss))(variables["params"])


@pytest.mark.parametrize(
    "config",
    [DPT, pytest.param(SEGMENTER, marks=pytest.mark.full)],
    ids=lambda c: c.name,
)
def test_every_parameter_has_a_gradient_and_recomputing_changes_none(config):
    keys = jax.random.split(jax.random.key(2), 2)
    config = dataclasses.replace(config, drop_path=0.3)
    plain = _gradient(config, keys)
    for path, leaf in jax.tree.leaves_with_path(plain):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    again = _gradient(dataclasses.replace(config, remat="all"), keys)
    chex.assert_trees_all_close(plain, again, rtol=1e-3, atol=1e-5)


# Of these, 22 and 11 tokens are joined and padded, 24 are not.
@pytest.mark.parametrize("size", [(2, 11), (1, 11), (2, 12)])
def test_a_blocks_forms_for_gpus_have_the_same_gradients(size):
    block = Block(heads=2, epsilon=1e-6, layer_scale=True)
    tokens = jax.random.normal(jax.random.key(0), (*size, 8))
    drop_path = jnp.array([[0.0, 2.0], [1.5, 1.0]])[: size[0]]
    shapes = jax.eval_shape(block.init, jax.random.key(1), tokens)
    variables = random_like(shapes)

    def loss(params, tokens):
        out = block.apply({"params": params}, tokens, drop_path)
        assert out.shape == tokens.shape
        return jnp.mean(out**3)

    gradients = jax.grad(loss, (0, 1))
    expected = gradients(variables["params"], tokens)
    with compiled_for("gpu"):
        found = gradients(variables["params"], tokens)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parts_of_a_dense_layer_are_those_of_its_result():
    layer, tokens = Dense(12), jax.random.normal(jax.random.key(0), (2, 5, 4))
    variables = layer.init(jax.random.key(1), tokens)
    parts = layer.apply(variables, tokens, 3, method="in_parts")
    whole = layer.apply(variables, tokens)
    chex.assert_trees_all_close(parts, jnp.split(whole, 3, axis=-1), atol=1e-6)


@pytest.mark.full
def test_bfloat16_is_near_float32():
    plain, half = (
        build_segmenter(dataclasses.replace(DPT, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    variables = init_variables(jax.random.key(0), DPT)
    images = jax.random.normal(jax.random.key(1), (1, 40, 40, 3))
    wanted = jax.jit(plain.apply)(variables, images).logits
    encode = jax.jit(lambda v, x: half.apply(v, x, method="encode"))
    taps = jax.eval_shape(encode, variables, images).taps
    assert {tap.dtype for tap in taps.values()} == {jnp.dtype("bfloat16")}
    found = jax.jit(half.apply)(variables, images).logits
    assert found.dtype == jnp.float32
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_paths_are_dropped_by_key_at_the_rate_of_their_depth():
    module = vit.ViT(vit.BACKBONES["dinov2_s14"], width=8, grid=37, drop_path=0.4)
    keys = jax.random.split(jax.random.key(0), 2000)
    scales = module._branch_scales(keys)
    assert scales.shape == (2000, 12, 2)
    np.testing.assert_allclose(scales.mean((0, 2)), 1, atol=0.06)
    np.testing.assert_allclose(scales[:, -1].max(), 1 / 0.6, rtol=1e-6)
    np.testing.assert_array_equal(scales[:, 0], 1)
    dropped = (scales == 0).mean((0, 2))
    np.testing.assert_allclose(dropped, np.linspace(0, 0.4, 12), atol=0.04)
    np.testing.assert_array_equal(module._branch_scales(keys[::-1]), scales[::-1])
    assert module._branch_scales(None) is None
    assert registry.has_dropout(dataclasses.replace(DPT, drop_path=0.1))
    assert not registry.has_dropout(DPT)


def test_branches_are_dropped_only_with_keys():
    config = dataclasses.replace(DPT, drop_path=0.9)
    network = Network(build_segmenter(config), **random_variables(config))
    images = jnp.broadcast_to(
        jax.random.normal(jax.random.key(1), (1, 40, 40, 3)), (4, 40, 40, 3)
    )
    keys = jax.random.split(jax.random.key(2), 4)
    plain, _ = network.encode(images, dropout_keys=keys)
    assert np.ptp(plain.taps["block3"], axis=0).max() < 1e-4
    noisy, _ = network.replace(train=True).encode(images, dropout_keys=keys)
    assert np.ptp(noisy.taps["block3"], axis=0).max() > 0.1


def test_the_mask_transformer_drops_elements_by_key_in_train_mode():
    assert registry.has_dropout(SEGMENTER)
    assert not registry.has_dropout(LINEAR)
    network = Network(build_segmenter(SEGMENTER), **random_variables(SEGMENTER))
    image = jax.random.normal(jax.random.key(1), (1, 40, 40, 3))
    images = jnp.broadcast_to(image, (3, 40, 40, 3))

    @functools.partial(jax.jit, static_argnames="train")
    def logits(keys, train):
        features, passed = network.replace(train=train).encode(
            images, dropout_keys=keys
        )
        return passed.decode(features)[0].logits

    keys = jax.random.split(jax.random.key(2), 3)
    noisy, turned = logits(keys, True), logits(keys[::-1], True)
    assert np.ptp(noisy, axis=0).max() > 0.01
    np.testing.assert_allclose(turned, noisy[::-1], rtol=1e-4, atol=1e-5)
    assert np.ptp(logits(keys, False), axis=0).max() < 1e-4
    assert np.ptp(logits(None, True), axis=0).max() < 1e-4


def test_predictions_of_any_size_pass_through_the_nearest_multiples():
    module, variables = build_segmenter(DPT), random_variables(DPT)
    image = np.random.default_rng(0).normal(size=(1, 27, 45, 3)).astype(np.float32)
    apply = jax.jit(module.apply)
    found = apply(variables, image).logits
    nearest = vit_oracle.bilinear(image[0], (24, 48), align_corners=True)
    inner = apply(variables, jnp.asarray(nearest[None], jnp.float32)).logits
    wanted = vit_oracle.bilinear(np.asarray(inner[0]), (27, 45), align_corners=True)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)
    tiny_shape = jax.eval_shape(apply, variables, image[:, :3, :4]).logits.shape
    assert tiny_shape == (1, 3, 4, 3)
    with pytest.raises(ValueError, match="multiples of 8; .* next ones are 24 and 32"):
        module.apply(variables, image, method="encode")


def test_halves_that_do_not_fit_are_refused():
    for name in ("dpt", "segmenter"):
        with pytest.raises(ValueError, match="four levels of tokens, .*layer4; set"):
            build_segmenter(ModelConfig(name=name, backbone="resnet50"))
    with pytest.raises(ValueError, match="'layer1', and the encoder has block0, "):
        build_segmenter(ModelConfig(backbone="vit_s16"))
    with pytest.raises(ValueError, match="data.crop=321: dinov2_s14 .* 308 and 322"):
        build_segmenter(dataclasses.replace(DPT, backbone="dinov2_s14", image_size=321))
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16"):
        ModelConfig(attention="cudnn")
    with pytest.raises(ValueError, match="'flash': valid are xla, cudnn"):
        ModelConfig(attention="flash")
    with pytest.raises(ValueError, match=r"drop_path=1.0: must be in \[0, 1\)"):
        ModelConfig(drop_path=1.0)


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("method=supervised", {"data__crop": 33}, "data.crop=33: .* are 32 and 40$"),
        (
            "method=supervised",
            {"model__backbone": "tiny"},
            "four levels of tokens, .* set --config.model.backbone to a vision",
        ),
        (
            "method=supervised",
            {"model__name": "deeplabv3plus"},
            "'layer1', and the encoder has block0, .* set another --config.model.back",
        ),
        (
            "method=supervised,mpmc=paper",
            {"mpmc__tap": "layer1"},
            "tap 'layer1' of dpt/tiny_dinov2: valid are block0, .*, decoder$",
        ),
        ("method=supervised", {"model__freeze": "head"}, "freeze='head': valid are"),
        ("method=cps", {"method__ema_decay": 0.9}, "=0.9: cps keeps no average"),
        (
            "method=unimatch_v2",
            {"train__group_size": 3, "train__batch_size": 6},
            "train.group_size=3 the middle image .* itself; use an even group$",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(argument, changes, message):
    """Before anything is trained; weights that do not fit: test_vit_weights.py."""
    given = {
        "model__name": "dpt",
        "model__backbone": "tiny_dinov2",
        "data__crop": 32,
        "mpmc__tap": "auto",
    }
    with pytest.raises(ValueError, match=message) as error:
        tiny.setup(tiny.config(argument, **given | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(DECODERS))
def test_further_heads_are_added_and_dropped(name):
    config = dataclasses.replace(DPT, name=name, embedding=True, auxiliary=True)
    channels = registry.dropout_channels(config)
    assert set(channels) == {"embed0", "embed1", "auxiliary0"}
    module, variables = build_segmenter(config), random_variables(config)
    images = jax.random.normal(jax.random.key(1), (2, 24, 24, 3))
    masks = {tap: jnp.ones((2, 1, 1, n)).at[1].set(0) for tap, n in channels.items()}

    @jax.jit
    def run():
        network = Network(module, **variables)
        features, network = network.encode(images)
        return network.decode(features, masks)[0]

    found = run()
    assert found.embedding.shape[-1] == registry.tap_channels(config, "decoder")
    assert found.auxiliary.shape == (2, 3, 3, 3)
    for head in (found.embedding, found.auxiliary):
        assert np.ptp(head[1], axis=(0, 1)).max() == 0 < np.ptp(head[0])


def test_whole_patches_of_any_image_are_classified():
    cfg = tiny.config(
        "method=supervised,mpmc=paper",
        model__name="dpt",
        model__backbone="tiny_dinov2",
        data__crop=32,
        mpmc__tap="auto",
    )
    parts = tiny.setup(cfg)
    probe = make_probe_builder(parts)(state_shape(parts))
    images, labels = jnp.zeros((1, 27, 45, 3)), jnp.zeros((1, 27, 45), jnp.int32)
    shapes = jax.eval_shape(probe.apply, probe.variables, images, labels)
    assert [each.shape[:3] for each in shapes] == [(1, 3, 5)] * 3
    assert (27 // probe.multiple, 45 // probe.multiple) == (3, 5)
    # An image that is smaller than a patch is one patch.
    shapes = jax.eval_shape(probe.apply, probe.variables, images[:, :5], labels[:, :5])
    assert [each.shape[:3] for each in shapes] == [(1, 1, 5)] * 3


@pytest.mark.full
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_a_step_on_the_mask_transformer(method):
    """With its dropout, and drop path in the encoder; the DPT head: test_parity.py."""
    cfg = tiny.config(
        f"method={method},mpmc=recommended",
        model__name="segmenter",
        model__backbone="shallow_vit",
        model__drop_path=0.1,
        data__crop=32,
        mpmc__tap="auto",
        mpmc__windows=(1, 3),
        method__threshold=0.0,
        train__batch_size=4,
        u2pl__warmup_epochs=0,
    )
    start = tiny.init_state(tiny.setup(cfg), cfg.seed)
    state, (metrics,) = tiny.run(cfg, 1, state=start)
    assert np.isfinite(metrics.values["loss"]) and not metrics.skipped
    for path, moved in jax.tree.leaves_with_path(
        jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, start.params)
    ):
        assert moved, jax.tree_util.keystr(path)
