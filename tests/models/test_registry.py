"""A new encoder and a new decoder are one file and one line of the registry each."""

import ast
import dataclasses
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.experiments.build import init_state, state_shape, tap_size
from mpmc_jax.methods import base
from mpmc_jax.models import (
    ModelConfig,
    ReceptiveField,
    build_segmenter,
    init_variables,
    layers,
    receptive_field,
    registry,
    title,
)
from mpmc_jax.models.interface import Decoder, Encoder, Tap
from mpmc_jax.models.layers import ConvSpec
from mpmc_jax.models.resize import resize_align_corners
from mpmc_jax.models.weights import convert, torch_names
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.precise_bn import make_bn_recompute
from mpmc_jax.training.state import variables_of
from mpmc_jax.types import Network, Prediction
from tests.support import tiny
from tests.support.toy_dataset import NUM_CLASSES, make_dataset

PATCH = 4


class Patches(nn.Module):
    """A patch embedding with positions, and one layer; no batch norm."""

    width: int
    grid: int

    @nn.compact
    def __call__(self, images, *, until, train):
        del train
        embed = layers.Conv(ConvSpec(self.width, PATCH, PATCH, zeros=0), name="embed")
        x_bhwd = embed(images)
        shape = (1, self.grid, self.grid, self.width)
        position = self.param("position", nn.initializers.normal(0.02), shape)
        x_bhwd = x_bhwd + resize_align_corners(position, x_bhwd.shape[1:3])
        taps = {"patches": x_bhwd}
        if until != "patches":
            taps["deep"] = nn.gelu(nn.Dense(self.width, name="dense")(x_bhwd))
        return taps


def toy_encoder(config, axis_name):
    del axis_name
    tap = Tap(config.width, (ConvSpec(config.width, PATCH, PATCH, zeros=0),))
    return Encoder(
        Patches(config.width, config.image_size // PATCH),
        taps={"patches": tap, "deep": tap},
        default_tap="patches",
        first_kernel=("embed", "kernel"),
        multiple=PATCH,
    )


class Linear(nn.Module):
    """A classifier on one tap."""

    num_classes: int
    reads: str

    @nn.compact
    def __call__(self, taps, *, train, decoder_dropout=None):
        del train, decoder_dropout
        logits = layers.Conv(
            ConvSpec(self.num_classes), use_bias=True, name="classifier"
        )
        return Prediction(logits(taps[self.reads]), decoder=taps[self.reads])


def toy_decoder(config, encoder, axis_name):
    del axis_name
    last = [*encoder.taps][-1]
    return Decoder(
        Linear(config.num_classes, last), inputs=(last,), tap=encoder.tap(last)
    )


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry.ENCODERS, "toy", toy_encoder)
    monkeypatch.setitem(registry.DECODERS, "toy", registry.DecoderEntry(toy_decoder))


def _config(argument, **changes):
    toy = {"model__name": "toy", "model__backbone": "toy", "data__crop": 32}
    return tiny.config(argument, mpmc__tap="auto", **toy, **changes)


def _restored(directory, parts, state):
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(state, {"next_index": 2}, wait=True)
    with Checkpointer(directory) as checkpointer:
        return checkpointer.restore_latest(state_shape(parts)).state


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        pytest.param("mean_teacher", "sgd", marks=pytest.mark.full),
        ("unimatch", "adamw"),
    ],
)
def test_toys_are_trained_averaged_evaluated_and_restored(tmp_path, method, optimizer):
    cfg = _config(
        f"method={method},mpmc=recommended",
        method__threshold=0.0,
        method__ema_decay=0.5,
        optimizer__name=optimizer,
    )
    parts = tiny.setup(cfg)
    state, metrics = tiny.run(cfg, 2)
    assert not any(each.skipped for each in metrics)
    assert metrics[-1].values["loss_patch_labeled"] > 0
    start = init_state(parts, cfg.seed)
    for kind in ("params", "ema_params"):
        moved = getattr(state, kind)["student"], getattr(start, kind)["student"]
        assert tiny.difference(*moved) > 0
    assert state.batch_stats["student"] == state.ema_batch_stats["student"] == {}
    assert state.batch_stats["plugin"]
    restored = _restored(tmp_path, parts, state)
    chex.assert_trees_all_equal(restored, state)
    evaluator = Evaluator(
        parts.step.modules["student"], NUM_CLASSES, batch_size=2, pad_to=PATCH
    )
    for averaged in (False, True):
        variables = variables_of(restored, "student", averaged=averaged)
        # At other sizes than that of the crop.
        result = evaluator.run(variables, make_dataset([(24, 30), (30, 24)]))
        assert result.confusion.sum() > 0


def test_a_network_without_batch_norm_has_no_statistics_to_recompute():
    cfg = _config("method=mean_teacher")
    parts, state = tiny.setup(cfg), tiny.run(cfg, 1)[0]
    assert not jax.tree.leaves((state.batch_stats, state.ema_batch_stats))
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel("pmap", layout, 1)
    recompute = make_bn_recompute(parallel, parts.step, lambda: [], 1)
    assert recompute(state, True) is state


def test_a_patch_is_what_a_token_sees_and_positions_are_those_of_the_crop():
    config = ModelConfig(name="toy", backbone="toy", width=8, image_size=40)
    assert title(config) == "toy/toy"
    for tap in ("patches", "deep", "decoder"):
        assert receptive_field(config, tap) == ReceptiveField(PATCH, PATCH, 0)
        assert tap_size(config, tap, 40) == (10, 10)
    variables = init_variables(jax.random.key(0), config)
    assert variables["params"]["backbone"]["position"].shape == (1, 10, 10, 8)
    module = build_segmenter(config)
    assert module.apply(variables, jnp.zeros((1, 24, 48, 3))).logits.shape[1:] == (
        (24, 48, 21)
    )
    with pytest.raises(ValueError, match="30x48 .* multiples of 4; set data.crop"):
        module.apply(variables, jnp.zeros((1, 30, 48, 3)), method="encode")


def test_halves_combine_or_are_refused_in_one_line():
    mixed = ModelConfig(name="toy", backbone="tiny", width=8, num_classes=3)
    shapes = jax.eval_shape(lambda key: init_variables(key, mixed), jax.random.key(0))
    assert set(shapes["params"]["decoder"]) == {"classifier"}
    assert set(shapes["batch_stats"]) == {"backbone"}
    with pytest.raises(ValueError, match="reads the tap 'layer1'.* has patches, deep"):
        build_segmenter(ModelConfig(backbone="toy"))


def test_weights_of_toys_are_saved_and_read(tmp_path):
    model = ModelConfig(name="toy", backbone="toy", width=8, image_size=40)
    variables = jax.tree.map(np.asarray, init_variables(jax.random.key(0), model))
    path = tmp_path / "toy.safetensors"
    weights = convert.Weights(model, True, variables, {})
    convert.save(path, weights)
    found = convert.load(path)
    assert found.model == model
    chex.assert_trees_all_equal(found.variables, variables)
    assert found.encoder().variables["batch_stats"] == {}
    start = convert.fit(found, model)
    chex.assert_trees_all_equal(start.variables, variables)
    with pytest.raises(convert.WeightsError, match="40 pixels, .* 32; .*data.crop=40$"):
        convert.fit(found, dataclasses.replace(model, image_size=32))
    with pytest.raises(ValueError, match="no weights of toy/toy were published"):
        torch_names.torch_names(model)


def test_no_other_file_asks_for_the_name_of_a_network():
    names = registry.ENCODERS.keys() | registry.DECODERS.keys()
    package = pathlib.Path(registry.__file__).parent.parent
    for path in package.rglob("*.py"):
        compared = [
            constant.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Compare)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant)
        ]
        assert not names & set(compared), path


def _flops(freeze, halves):
    """Of a train-mode pass and its gradient with respect to some halves."""
    model = ModelConfig(backbone="tiny", width=8, num_classes=4, freeze=freeze)
    module, key = build_segmenter(model), jax.random.key(0)
    variables = jax.eval_shape(lambda k: init_variables(k, model), key)

    def loss(some, params, stats, images):
        network = Network(module, {**params, **some}, stats, train=True)
        passed, _ = base.full_pass(network, images)
        return jnp.mean(passed.logits**2)

    params, stats = variables["params"], variables["batch_stats"]
    some = {half: params[half] for half in halves}
    images = jnp.zeros((4, 33, 33, 3))
    program = jax.jit(jax.grad(loss)).lower(some, params, stats, images).compile()
    return program.cost_analysis()["flops"]


def test_a_frozen_encoder_costs_no_gradient():
    """No more than differentiating the decoder alone, and less than the whole."""
    frozen = _flops("encoder", ("backbone", "decoder"))
    decoder = _flops("", ("decoder",))
    assert frozen <= decoder < 0.8 * _flops("", ("backbone", "decoder"))


@pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.full)]
)
def test_a_frozen_encoder_stays_bit_for_bit(tmp_path, optimizer):
    cfg = tiny.config(
        "method=supervised", model__freeze="encoder", optimizer__name=optimizer
    )
    parts = tiny.setup(cfg)
    start, (state, _) = init_state(parts, cfg.seed), tiny.run(cfg, 2)
    for kind in ("params", "batch_stats"):
        before, after = getattr(start, kind)["student"], getattr(state, kind)["student"]
        chex.assert_trees_all_equal(after["backbone"], before["backbone"])
        assert tiny.difference(after["decoder"], before["decoder"]) > 0
    number = len(jax.tree.leaves(state.params["student"]["decoder"]))
    moments = [x for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
    assert len(moments) == number * (2 if optimizer == "adamw" else 1)
    chex.assert_trees_all_equal(_restored(tmp_path, parts, state), state)
    with pytest.raises(ValueError, match=r"model.freeze='decoder': valid are \['', 'e"):
        tiny.setup(tiny.config("method=supervised", model__freeze="decoder"))


def test_recomputed_statistics_leave_a_frozen_encoder_alone():
    cfg = tiny.config("method=supervised", model__freeze="encoder")
    parts = tiny.setup(cfg)
    state = jax.tree.map(np.asarray, init_state(parts, 0))
    layout = Layout(cfg.train.batch_size, cfg.train.group_size, 1)
    parallel = Parallel("pmap", layout, 1)
    batch = tiny.batch(0, cfg, parts.step.method)
    recompute = make_bn_recompute(
        parallel, parts.step, lambda: [parallel.place(batch)], 1
    )
    found = parallel.fetch(recompute(parallel.replicate(state), False))
    before, after = state.batch_stats["student"], found.batch_stats["student"]
    chex.assert_trees_all_equal(after["backbone"], before["backbone"])
    assert tiny.difference(after["decoder"], before["decoder"]) > 1e-3
