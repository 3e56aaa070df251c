"""What training takes at least, held against the networks themselves."""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mpmc_jax.models import ModelConfig, footprint, layers, title
from mpmc_jax.models.decoders.dpt import TransposedConv
from mpmc_jax.models.encoders.vit import PatchEmbedding
from mpmc_jax.models.registry import build_segmenter, feature_maps
from mpmc_jax.models.transformer import Dense
from mpmc_jax.models.weights.torch_names import variable_shapes

NETWORKS = [
    *(
        ModelConfig(backbone="resnet18", variant=v)
        for v in ("unimatch", "augseg", "ael")
    ),
    ModelConfig(backbone="resnet50", width=32),
    ModelConfig(name="unet", in_channels=1, num_classes=4),
    ModelConfig(name="dpt", backbone="dinov2_s14"),
    ModelConfig(name="segmenter", backbone="vit_s16"),
]
_RECORDED = (layers.Conv, Dense, PatchEmbedding, TransposedConv)
RESULTS = pathlib.Path(__file__).parent.parent.parent / "results" / "bench"
# Of 1 x 1 positions, or of heads.
_LEFT_OUT = {"aspp_pool", "classifier"}


def _given(config, side):
    """Bytes of what every layer with a kernel gives for one image, by tracing it."""
    found = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        called = context.method_name == "__call__"
        if called and isinstance(context.module, _RECORDED):
            found.append(out.size * 4)
        return out

    module = build_segmenter(config)
    images = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0), images)
    return found


@pytest.mark.parametrize("config", NETWORKS, ids=title)
def test_the_list_of_maps_is_the_network(config):
    kernels = [
        (leaf.size, leaf.shape[-1])
        for path, leaf in variable_shapes(config).items()
        if path[-1] == "kernel" and not set(path) & _LEFT_OUT
    ]
    listed = [(each.weights, each.channels) for each in feature_maps(config)]
    assert collections.Counter(listed) == collections.Counter(kernels)


@pytest.mark.parametrize("config", NETWORKS, ids=title)
def test_the_bound_is_just_below_what_the_convolutions_give(config):
    multiple = build_segmenter(config).multiple
    side = 160 // multiple * multiple
    given = _given(config, side)
    logits = config.num_classes * side**2 * 4
    parameters = 12 * sum(each.weights for each in feature_maps(config))
    bound = footprint.training_bytes(config, 3, side, recomputes=False) - parameters
    assert 0.9 * sum(given) < bound / 3 - logits <= sum(given)
    least = footprint.training_bytes(config, 3, side, recomputes=True) - parameters
    assert least == 3 * max(*given, logits)


@pytest.mark.parametrize("config", NETWORKS[:4], ids=title)
def test_flops_are_those_of_the_convolutions(config):
    module, side = build_segmenter(config), 96
    images = jnp.zeros((1, side, side, config.in_channels))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    counted = jax.jit(module.apply).lower(variables, images).cost_analysis()["flops"]
    found = footprint.training_flops(config, 2, side)
    # XLA leaves out products with the padding, which is much of so small an image.
    assert 0.8 * counted < found / 6 < 1.4 * counted


@pytest.mark.parametrize("measured", ["programs_cpu", "tpu_compile"])
def test_the_bound_is_below_every_peak_that_xla_counted(measured):
    """A run that fits is never refused; peaks of whole steps, by `launch.bench`."""
    lines = (RESULTS / f"{measured}.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        config = ModelConfig(backbone=line["backbone"], dtype=line["dtype"])
        unlabeled = line["method"] != "supervised"
        images = line["images_a_chip"] * (1 + unlabeled)
        bound = footprint.training_bytes(
            config, images, line["crop"], recomputes=line["chip"] != "cpu"
        )
        assert 0.02 * line["peak_bytes"] < bound < line["peak_bytes"], line["method"]


def test_sizes_that_no_machine_holds_are_counted():
    wide = ModelConfig(width=4 * 10**9)
    assert footprint.training_bytes(wide, 1, 33, recomputes=True) > 10**21
    config = ModelConfig(dtype="bfloat16")
    exact = footprint.training_bytes(config, 10**9, 10**9, recomputes=False)
    assert exact > 10**28
