"""Weights of vision transformers in every published layout, bit for bit."""

import dataclasses

import chex
import numpy as np
import pytest

from mpmc_jax.models import ModelConfig, load_torch_backbone, registry
from mpmc_jax.models.encoders import vit
from mpmc_jax.models.weights import convert, torch_names
from tests.support import vit_oracle

DEPTH, D, GRID, CLASSES = 3, 64, 4, 5


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Networks of the published families with a single head of 64 channels."""
    for name, family in (("small_dinov2", vit.DINOV2), ("small_vit", vit.AUGREG)):
        grid = family.grid and GRID
        family = dataclasses.replace(family, grid=grid)
        spec = vit.Backbone(family, heads=1, depth=DEPTH, levels=(0, 0, 1, 2))
        monkeypatch.setitem(vit.BACKBONES, name, spec)
        monkeypatch.setitem(registry.ENCODERS, name, vit.build)


def encoder_shapes(d=D, depth=DEPTH, patch=14, grid=GRID, *, layer_scale=True):
    """Keys and shapes as Meta and timm publish them, without the unused ones."""
    found = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 1 + grid**2, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for i in range(depth):
        block = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc1.bias": (4 * d,),
            "mlp.fc2.weight": (d, 4 * d),
            "mlp.fc2.bias": (d,),
        }
        if layer_scale:
            block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
        found |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return found


def dpt_shapes(d, f, channels, classes):
    """Keys and shapes of UniMatch V2's head, without the unused unit."""
    c1, c2, c3, c4 = channels
    found = {
        "resize_layers.0.weight": (c1, c1, 4, 4),
        "resize_layers.0.bias": (c1,),
        "resize_layers.1.weight": (c2, c2, 2, 2),
        "resize_layers.1.bias": (c2,),
        "resize_layers.3.weight": (c4, c4, 3, 3),
        "resize_layers.3.bias": (c4,),
        "scratch.output_conv.0.weight": (f, f, 3, 3),
        "scratch.output_conv.0.bias": (f,),
        "scratch.output_conv.2.weight": (classes, f, 1, 1),
        "scratch.output_conv.2.bias": (classes,),
    }
    for i, c in enumerate((c1, c2, c3, c4)):
        found[f"projects.{i}.weight"] = (c, d, 1, 1)
        found[f"projects.{i}.bias"] = (c,)
        found[f"scratch.layer{i + 1}_rn.weight"] = (f, c, 3, 3)
        fusion = f"scratch.refinenet{i + 1}"
        found |= {f"{fusion}.out_conv.weight": (f, f, 1, 1)}
        found |= {f"{fusion}.out_conv.bias": (f,)}
        for unit in ("resConfUnit1", "resConfUnit2")[i == 3 :]:
            for conv in ("conv1", "conv2"):
                found[f"{fusion}.{unit}.{conv}.weight"] = (f, f, 3, 3)
                found[f"{fusion}.{unit}.{conv}.bias"] = (f,)
    return {f"head.{key}": shape for key, shape in found.items()}


def mask_shapes(d, classes):
    """Keys and shapes of Segmenter's mask transformer."""
    blocks = encoder_shapes(d, 2, layer_scale=False)
    found = {k: shape for k, shape in blocks.items() if k.startswith("blocks.")}
    found |= {
        "cls_emb": (1, classes, d),
        "proj_dec.weight": (d, d),
        "proj_dec.bias": (d,),
        "proj_patch": (d, d),
        "proj_classes": (d, d),
        "decoder_norm.weight": (d,),
        "decoder_norm.bias": (d,),
        "mask_norm.weight": (classes,),
        "mask_norm.bias": (classes,),
    }
    return {f"decoder.{key}": shape for key, shape in found.items()}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def prefixed(arrays, prefix):
    return {prefix + key: value for key, value in arrays.items()}


def as_transformers(arrays):
    """The layout of facebook/dinov2-*."""
    ends = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    found = {new: arrays[old] for old, new in ends.items()}
    for i in range(DEPTH):
        old, new = f"blocks.{i}.", f"encoder.layer.{i}."
        for leaf in ("weight", "bias"):
            parts = np.split(arrays[f"{old}attn.qkv.{leaf}"], 3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{new}attention.attention.{name}.{leaf}"] = part
            found[f"{new}attention.output.dense.{leaf}"] = arrays[
                f"{old}attn.proj.{leaf}"
            ]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{new}{name}.{leaf}"] = arrays[f"{old}{name}.{leaf}"]
        for j in (1, 2):
            found[f"{new}layer_scale{j}.lambda1"] = arrays[f"{old}ls{j}.gamma"]
    return found


def as_augreg(arrays, heads):
    """The layout of the original .npz files, whose kernels have Flax's axes."""
    found = {
        "cls": arrays["cls_token"],
        "Transformer/posembed_input/pos_embedding": arrays["pos_embed"],
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": arrays["norm.weight"],
        "Transformer/encoder_norm/bias": arrays["norm.bias"],
        "head/kernel": np.zeros((D, 1000), np.float32),
        "head/bias": np.zeros(1000, np.float32),
    }
    for i in range(DEPTH):
        old, new = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{new}MultiHeadDotProductAttention_1/"
        for j in (1, 2):
            norm, mlp = f"{new}LayerNorm_{2 * j - 2}", f"{new}MlpBlock_3/Dense_{j - 1}"
            found[f"{norm}/scale"] = arrays[f"{old}norm{j}.weight"]
            found[f"{norm}/bias"] = arrays[f"{old}norm{j}.bias"]
            found[f"{mlp}/kernel"] = arrays[f"{old}mlp.fc{j}.weight"].T
            found[f"{mlp}/bias"] = arrays[f"{old}mlp.fc{j}.bias"]
        kernels = np.split(arrays[f"{old}attn.qkv.weight"], 3)
        biases = np.split(arrays[f"{old}attn.qkv.bias"], 3)
        for k, name in enumerate(("query", "key", "value")):
            found[f"{attention}{name}/kernel"] = kernels[k].T.reshape(D, heads, -1)
            found[f"{attention}{name}/bias"] = biases[k].reshape(heads, -1)
        out = arrays[f"{old}attn.proj.weight"].T.reshape(heads, -1, D)
        found[f"{attention}out/kernel"] = out
        found[f"{attention}out/bias"] = arrays[f"{old}attn.proj.bias"]
    return found


def loaded(tmp_path, arrays):
    path = tmp_path / "weights.npz"
    np.savez(path, **arrays)
    return convert.load(path)


def leaf(weights, *path):
    tree = weights.variables["params"]
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize(
    ("backbone", "d", "depth", "patch", "grid"),
    [
        ("dinov2_s14", 384, 12, 14, 37),
        ("dinov2_b14", 768, 12, 14, 37),
        pytest.param("dinov2_l14", 1024, 24, 14, 37, marks=pytest.mark.full),
        ("vit_s16", 384, 12, 16, 24),
        ("vit_b16", 768, 12, 16, 24),
        pytest.param("vit_l16", 1024, 24, 16, 24, marks=pytest.mark.full),
    ],
)
def test_the_networks_have_the_published_keys_and_shapes(
    backbone, d, depth, patch, grid
):
    is_dinov2 = backbone.startswith("dinov2")
    config = ModelConfig(
        name="dpt" if is_dinov2 else "segmenter",
        backbone=backbone,
        num_classes=21,
        image_size=patch * grid,
    )
    encoder = encoder_shapes(d, depth, patch, grid, layer_scale=is_dinov2)
    if is_dinov2:
        f, channels = {
            384: (64, (48, 96, 192, 384)),
            768: (128, (96, 192, 384, 768)),
            1024: (256, (256, 512, 1024, 1024)),
        }[d]
        wanted = prefixed(encoder, "backbone.") | dpt_shapes(d, f, channels, 21)
    else:
        wanted = prefixed(encoder, "encoder.") | mask_shapes(d, 21)
    found = {}
    for path, shape in torch_names.variable_shapes(config).items():
        axes = shape.shape
        if len(axes) == 4:
            axes = tuple(axes[i] for i in (3, 2, 0, 1))
        elif path[-1] == "kernel":
            axes = axes[::-1]
        found[torch_names.torch_names(config)[path]] = axes
    assert found == wanted


def test_every_layout_of_dinov2_gives_the_same_variables(tmp_path):
    arrays = drawn(encoder_shapes())
    token = {"mask_token": np.zeros((1, D), np.float32)}
    timm = loaded(tmp_path, arrays)
    assert not timm.whole and timm.model.backbone == "small_dinov2"
    assert timm.variables["batch_stats"] == {}
    qkv = arrays["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(
        leaf(timm, "backbone", "block1", "qkv", "kernel"), qkv.T
    )
    embed = arrays["patch_embed.proj.weight"]
    np.testing.assert_array_equal(
        leaf(timm, "backbone", "embed", "kernel"), embed.transpose(2, 3, 1, 0)
    )
    transformers = as_transformers(arrays) | {
        "embeddings.mask_token": token["mask_token"]
    }
    for other in (arrays | token, transformers):
        found = loaded(tmp_path, other)
        assert found.model == timm.model
        chex.assert_trees_all_equal(found.variables, timm.variables)
    params, stats = load_torch_backbone(arrays | token, timm.model)
    chex.assert_trees_all_equal(params, timm.variables["params"]["backbone"])
    assert stats == {}
    chex.assert_trees_all_equal(
        torch_names.torch_state_dict(timm.variables, timm.model), arrays
    )


def test_both_layouts_of_augreg_give_the_same_variables(tmp_path):
    arrays = drawn(encoder_shapes(patch=16, layer_scale=False))
    head = {"head.weight": np.zeros((9, D), np.float32), "head.bias": np.zeros(9)}
    timm = loaded(tmp_path, arrays | head)
    assert timm.model.backbone == "small_vit" and timm.model.image_size == 16 * GRID
    for heads in (1, 4):
        original = as_augreg(arrays, heads)
        for prefix in ("", "opt/target/"):
            found = loaded(tmp_path, prefixed(original, prefix))
            chex.assert_trees_all_equal(found.variables, timm.variables)


def test_unimatch_v2s_checkpoint_is_read_whole_and_written(tmp_path):
    sizes = (8, 16, 32, 64)
    head = drawn(dpt_shapes(D, 10, sizes, CLASSES), 1)
    arrays = prefixed(drawn(encoder_shapes()), "backbone.") | head
    unused = {
        "backbone.mask_token": np.zeros((1, D), np.float32),
        "head.scratch.refinenet4.resConfUnit1.conv1.bias": np.zeros(10, np.float32),
    }
    found = loaded(tmp_path, prefixed(arrays | unused, "module."))
    assert found.whole and found.model.name == "dpt"
    assert found.model.num_classes == CLASSES
    transposed = head["head.resize_layers.0.weight"]
    np.testing.assert_array_equal(
        leaf(found, "decoder", "resize1", "kernel"), transposed.transpose(2, 3, 1, 0)
    )
    written = torch_names.torch_state_dict(found.variables, found.model)
    chex.assert_trees_all_equal(written, arrays)


@pytest.mark.parametrize("name", ["segmenter", "segmenter_linear"])
def test_segmenters_checkpoints_are_read_whole_and_written(tmp_path, name):
    encoder = drawn(encoder_shapes(patch=16, layer_scale=False))
    linear = {"decoder.head.weight": (CLASSES, D), "decoder.head.bias": (CLASSES,)}
    decoder = mask_shapes(D, CLASSES) if name == "segmenter" else linear
    arrays = prefixed(encoder, "encoder.") | drawn(decoder, 1)
    unused = {"encoder.head.weight": np.zeros((9, D), np.float32)}
    found = loaded(tmp_path, arrays | unused)
    assert found.whole and found.model.name == name
    assert found.model.num_classes == CLASSES
    if name == "segmenter":
        np.testing.assert_array_equal(
            leaf(found, "decoder", "masks", "patch_projection"),
            arrays["decoder.proj_patch"],
        )
    written = torch_names.torch_state_dict(found.variables, found.model)
    chex.assert_trees_all_equal(written, arrays)


def test_positions_follow_the_crop_of_the_run(tmp_path):
    arrays = drawn(encoder_shapes(patch=16, layer_scale=False))
    weights = loaded(tmp_path, arrays)
    model = ModelConfig(name="segmenter", backbone="small_vit", image_size=96)
    position = convert.fit(weights, model).variables["params"]["backbone"]["position"]
    wanted = vit_oracle.positions(arrays["pos_embed"][0], (6, 6), None)
    np.testing.assert_allclose(position[0], wanted, atol=1e-5)
    # DINOv2's keep their grid, and are resized at every pass.
    dinov2 = loaded(tmp_path, drawn(encoder_shapes()))
    model = ModelConfig(name="dpt", backbone="small_dinov2", image_size=98)
    start = convert.fit(dinov2, model)
    chex.assert_trees_all_equal(start.variables, dinov2.variables)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    def refused(shapes, message):
        with pytest.raises(convert.WeightsError, match=message):
            loaded(tmp_path, drawn(shapes))

    shapes = encoder_shapes()
    refused(
        shapes | {"pos_embed": (1, 16, D)},
        "16 position embeddings are not those of .* square grid",
    )
    refused(
        encoder_shapes(patch=15), "64 channels, 3 blocks, patches of 15 pixels and L"
    )
    refused(encoder_shapes(grid=5), r"shape pos_embed: \(1, 26, 64\)")
    refused(shapes | {"register_tokens": (1, 4, D)}, "unused register_tokens")
    del shapes["blocks.1.norm1.bias"]
    refused(shapes, r"missing blocks\.1\.norm1\.bias")
    transformers = as_transformers(drawn(encoder_shapes()))
    del transformers["encoder.layer.0.attention.attention.key.bias"]
    with pytest.raises(convert.WeightsError, match="0.attn.qkv.bias has not all of q"):
        loaded(tmp_path, transformers)
    dinov2 = loaded(tmp_path, drawn(encoder_shapes()))
    model = ModelConfig(name="segmenter", backbone="small_vit", image_size=64)
    with pytest.raises(
        convert.WeightsError, match="set --config.model.backbone=small_d"
    ):
        convert.fit(dinov2, model)
    embedding = dataclasses.replace(dinov2.model, embedding=True)
    with pytest.raises(ValueError, match="published network has no unit 'further'"):
        torch_names.torch_names(embedding)
