"""Weights between PyTorch, files and networks: detected, complete, safe to read."""

import contextlib
import dataclasses
import json
import pickle
import pickletools
import sys
import types
import zipfile

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from mpmc_jax.models import ModelConfig, weight_files, weights
from mpmc_jax.models.detection import detect
from mpmc_jax.models.pretrained import ENCODER_PREFIX, torch_state_dict
from mpmc_jax.models.weight_files import WeightsError
from tests.variables import random_variables

NETWORKS = {
    "unimatch": ModelConfig(width=4, num_classes=3, backbone="resnet50"),
    "augseg": ModelConfig(width=8, variant="augseg", backbone="resnet50_plain"),
    "u2pl": ModelConfig(
        width=4, num_classes=5, variant="u2pl", embedding=True, auxiliary=True
    ),
    "ael": ModelConfig(width=4, variant="ael", auxiliary=True, backbone="resnet18"),
    "deep101": ModelConfig(width=4, backbone="resnet101", in_channels=4),
    "plain101": ModelConfig(width=4, backbone="resnet101_plain"),
    "unet": ModelConfig(name="unet", width=8, num_classes=4, in_channels=1),
}


def as_published(config, counters=True):
    """Random weights of a network as PyTorch saves them, and the variables."""
    variables = random_variables(config)
    arrays = torch_state_dict(variables, config)
    if counters:
        arrays |= {
            key.replace("running_mean", "num_batches_tracked"): np.array(7)
            for key in arrays
            if key.endswith("running_mean")
        }
    return arrays, variables


def encoder_of(arrays, config):
    prefix = ENCODER_PREFIX[config.variant]
    return {
        key.removeprefix(prefix): value
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save(path, arrays, metadata=None):
    safetensors_numpy.save_file(arrays, path, metadata=metadata)
    return path


LARGE = ("deep101", "plain101")


def params(*names):
    """Networks as parameters; the large ones wait for the full tests."""
    return [
        pytest.param(name, marks=[pytest.mark.full] * (name in LARGE)) for name in names
    ]


@pytest.mark.parametrize("name", params(*NETWORKS))
def test_a_network_is_found_from_its_keys_and_comes_back(name, tmp_path):
    config = NETWORKS[name]
    arrays, variables = as_published(config)
    given = {f"module.{key}": value for key, value in arrays.items()}
    found = weights.load(save(tmp_path / "given.safetensors", given))
    assert found.model == config and found.whole
    assert_equal(found.variables, variables)
    own = tmp_path / "own.safetensors"
    weights.save(own, found)
    again = weights.load(own)
    assert again.model == config and again.whole
    assert_equal(again.variables, variables)
    given_sum = weight_files.checksum(tmp_path / "given.safetensors")
    assert found.origin == {"file": "given.safetensors", "sha256": given_sum}
    assert again.origin["source_sha256"] == given_sum
    assert again.origin["sha256"] == weight_files.checksum(own) != given_sum
    back = torch_state_dict(again.variables, again.model)
    assert {k for k in arrays if "num_batches" not in k} == set(back)
    for key, value in back.items():
        np.testing.assert_array_equal(value, arrays[key])


@pytest.mark.parametrize("name", params("unimatch", "augseg", "ael", *LARGE))
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_an_encoder_alone_is_found_from_stem_and_depths(name, suffix, tmp_path):
    config = NETWORKS[name]
    arrays, variables = as_published(config)
    flat = encoder_of(arrays, config)
    flat |= {"fc.weight": np.zeros((1000, 2)), "fc.bias": np.zeros(1000)}
    path = tmp_path / f"encoder.{suffix}"
    _ = save(path, flat) if suffix == "safetensors" else np.savez(path, **flat)
    found = weights.load(path)
    assert not found.whole
    described = (found.model.backbone, found.model.width, found.model.in_channels)
    assert described == (config.backbone, config.width, config.in_channels)
    assert set(found.variables["params"]) == {"backbone"}
    for kind in ("params", "batch_stats"):
        assert_equal(found.variables[kind]["backbone"], variables[kind]["backbone"])
    back = torch_state_dict(found.variables, found.model)
    for key, value in back.items():
        np.testing.assert_array_equal(value, flat[key])
    assert {key for key in flat if "num_batches" not in key} - set(back) == {
        "fc.weight",
        "fc.bias",
    }


def test_every_key_is_accounted_for(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    del arrays["backbone.layer2.1.bn1.bias"]
    arrays["head.b9.weight"] = np.zeros(3, np.float32)
    with pytest.raises(WeightsError) as caught:
        weights.load(save(tmp_path / "w.safetensors", arrays))
    assert "w.safetensors" in str(caught.value)
    assert "missing backbone.layer2.1.bn1.bias" in str(caught.value)
    assert "unused head.b9.weight" in str(caught.value)


def test_a_wrong_file_names_the_first_missing_keys(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    kept = {k: v for k, v in arrays.items() if "layer1" in k or ".conv1.0" in k}
    kept["head.b0.0.weight"] = arrays["head.b0.0.weight"]
    kept["classifier.weight"] = arrays["classifier.weight"]
    for layer in (2, 3, 4):
        kept |= {
            k: v for k, v in arrays.items() if f"layer{layer}" in k and "conv" in k
        }
    with pytest.raises(WeightsError, match="missing backbone.*; and [0-9]+ more") as e:
        weights.load(save(tmp_path / "w.safetensors", kept))
    assert len(str(e.value)) < 1000
    strange = {"blocks.0.attn.qkv.weight": np.zeros((3, 3), np.float32)}
    with pytest.raises(WeightsError, match="first keys are blocks.0.attn.qkv.weight"):
        weights.load(save(tmp_path / "vit.safetensors", strange))


def test_depths_and_stems_that_we_do_not_have_are_named(tmp_path):
    config = NETWORKS["unimatch"]
    arrays, _ = as_published(config, counters=False)
    flat = encoder_of(arrays, config)
    short = {key: value for key, value in flat.items() if "layer3.5" not in key}
    with pytest.raises(ValueError, match=r"deep stem and \(3, 4, 5, 3\) bottleneck"):
        detect({key: value.shape for key, value in short.items()})


def _weights(config, whole=True, path="w.safetensors"):
    found = weights.Weights(config, True, random_variables(config), {"file": path})
    return found if whole else found.encoder()


@pytest.mark.parametrize(
    ("changes", "whole", "message"),
    [
        ({"backbone": "resnet101"}, False, "--config.model.backbone=resnet50"),
        ({"backbone": "resnet50_plain"}, False, "backbone='resnet50'"),
        ({"backbone": "resnet50_plain"}, True, "backbone='resnet50'"),
        ({"width": 8}, False, "width=4"),
        ({"variant": "augseg"}, True, "variant='unimatch'.*--part=encoder"),
        ({"num_classes": 7}, True, "num_classes=3, this run has 7;.*--part=encoder"),
        ({"name": "unet"}, False, "name='deeplabv3plus'"),
    ],
)
def test_weights_of_another_network_are_refused(changes, whole, message):
    config = NETWORKS["unimatch"]
    other = dataclasses.replace(config, **changes)
    with pytest.raises(WeightsError, match=message):
        weights.fit(_weights(config, whole), other)


def test_heads_that_only_one_side_has_are_told():
    full = NETWORKS["u2pl"]
    plain = dataclasses.replace(full, embedding=False, auxiliary=False)
    start = weights.fit(_weights(full), plain)
    assert start.unused == (
        "auxiliary",
        "auxiliary0",
        "embed0",
        "embed1",
        "embedding",
    )
    assert start.fresh == ()
    start = weights.fit(_weights(plain), full)
    assert "embedding" in start.fresh and start.unused == ()
    assert "embedding" not in start.variables["params"]["decoder"]
    # Of an encoder all heads are fresh, which nobody need be told.
    start = weights.fit(_weights(plain, whole=False), full)
    assert start.fresh == start.unused == () and not start.adapted


@hypothesis.given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 9))
def test_channels_that_repeat_give_what_the_given_ones_gave(given, wanted, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((3, 3, given, 5)).astype(np.float32)
    adapted = weights.adapt_channels(kernel, wanted)
    assert adapted.shape == (3, 3, wanted, 5) and adapted.dtype == np.float32
    if wanted == 1:
        grey = rng.standard_normal((3, 3, 1)).astype(np.float32)
        same = np.einsum("hwi,hwio->o", grey.repeat(given, -1), kernel)
        np.testing.assert_allclose(
            np.einsum("hwi,hwio->o", grey, adapted), same, rtol=1e-4, atol=1e-5
        )
    elif wanted % given == 0:
        patch = rng.standard_normal((3, 3, given)).astype(np.float32)
        again = np.concatenate([patch] * (wanted // given), -1)
        np.testing.assert_allclose(
            np.einsum("hwi,hwio->o", again, adapted),
            np.einsum("hwi,hwio->o", patch, kernel),
            rtol=1e-4,
            atol=1e-5,
        )
    if wanted == given > 1:
        np.testing.assert_array_equal(adapted, kernel)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_first_convolution_is_adapted_and_nothing_else(channels):
    config = NETWORKS["unimatch"]
    found = _weights(config)
    start = weights.fit(found, dataclasses.replace(config, in_channels=channels))
    assert start.adapted == (channels != 3)
    kernel = start.variables["params"]["backbone"]["stem0"]["conv"].pop("kernel")
    given = found.variables["params"]["backbone"]["stem0"]["conv"].pop("kernel")
    np.testing.assert_array_equal(kernel, weights.adapt_channels(given, channels))
    assert_equal(start.variables, found.variables)


class _Bomb:
    """What unpickles to a file in the test's folder, if anything unpickles it."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (open, (str(self._path), "w"))


def test_a_pickle_in_an_npz_is_never_loaded(tmp_path):
    proof = tmp_path / "proof"
    array = np.empty((), object)
    array[()] = _Bomb(proof)
    np.savez(tmp_path / "w.npz", **{"conv1.weight": array})
    with pytest.raises(WeightsError, match="w.npz.*allow_pickle"):
        weights.load(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("conv1.weight.npy", pickle.dumps(_Bomb(proof)))
    with pytest.raises(WeightsError, match="v.npz"):
        weights.load(tmp_path / "v.npz")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.npz", b"PK", "no readable .npz"),
        ("w.npz", b"", "no readable .npz"),
        ("w.safetensors", b"", "no readable safetensors"),
        ("w.safetensors", (2**62).to_bytes(8, "little") + b"{}", "no readable safeten"),
        ("w.h5", b"", "weights are read from .safetensors"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*{message}"):
        weights.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        weights.load(tmp_path / "nothing.npz")


def test_an_empty_file_holds_nothing(tmp_path):
    np.savez(tmp_path / "w.npz")
    with pytest.raises(WeightsError, match="holds no array"):
        weights.load(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "9"}, "format version '9'"),
        ({"model": "{"}, "'model' is no JSON object"),
        ({"model": "__import__('os').system('true')"}, "'model' is no JSON object"),
        ({"model": '{"name": "unet"}'}, "metadata's model has"),
        ({"model": ("width", "4")}, "width='4'"),
        ({"model": ("width", 8)}, "of another shape"),
        ({"model": ("backbone", "resnet9")}, "valid are"),
    ],
)
def test_our_own_files_are_checked_too(changes, message, tmp_path):
    path = tmp_path / "w.safetensors"
    weights.save(path, _weights(NETWORKS["unimatch"]))
    file = weight_files.read(path)
    for name, value in changes.items():
        if isinstance(value, tuple):
            value = json.dumps(json.loads(file.metadata[name]) | {value[0]: value[1]})
        file.metadata[name] = value
    weight_files.write(path, file.arrays, file.metadata)
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


def test_half_precision_becomes_single(tmp_path):
    arrays, _ = as_published(NETWORKS["unimatch"], counters=False)
    halves = {key: value.astype(np.float16) for key, value in arrays.items()}
    found = weights.load(save(tmp_path / "w.safetensors", halves))
    for leaf in jax.tree.leaves(found.variables):
        assert leaf.dtype == np.float32


class _Tensor:
    """As much of a PyTorch tensor as reading one takes."""

    dtype = "float32"

    def __init__(self, array):
        self._array = array

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return self._array


def _fake_torch(monkeypatch, content, version="2.6.0+cpu"):
    calls = []

    def load(path, **options):
        calls.append(options)
        if isinstance(content, Exception):
            raise content
        return content

    torch = types.ModuleType("torch")
    torch.__version__ = version
    torch.Tensor, torch.bfloat16, torch.load = _Tensor, "bfloat16", load
    torch.serialization = types.SimpleNamespace(safe_globals=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return calls


def _tensors(arrays):
    return {key: _Tensor(value) for key, value in arrays.items()}


def test_pytorch_is_asked_for_weights_only(monkeypatch, tmp_path):
    config = NETWORKS["unimatch"]
    arrays, variables = as_published(config)
    path = tmp_path / "best.pth"
    path.write_bytes(b"as PyTorch wrote it")
    calls = _fake_torch(
        monkeypatch, {"model": _tensors(arrays), "epoch": 3, "optimizer": {"state": {}}}
    )
    found = weights.load(path)
    assert calls == [{"map_location": "cpu", "weights_only": True}]
    assert found.origin["state"] == "model"
    assert_equal(found.variables, variables)


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cu117"])
def test_a_pytorch_that_can_be_tricked_is_not_used(version, monkeypatch, tmp_path):
    path = tmp_path / "best.pth"
    path.write_bytes(pickle.dumps(_Bomb(tmp_path / "proof")))
    calls = _fake_torch(monkeypatch, {}, version)
    with pytest.raises(WeightsError, match=r"best.pth: PyTorch .*torch>=2\.6"):
        weights.load(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"best.pth: only PyTorch .*torch>=2\.6"):
        weights.load(path)
    assert not calls and not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("Weights only load failed. Re-run with\nlong", "Weights only load failed$"),
        ("x\nWeightsUnpickler: GLOBAL posix.mkdir was not", "asks for posix.mkdir, wh"),
        ("", "UnpicklingError$"),
    ],
)
def test_what_pytorch_refuses_is_one_line(told, message, monkeypatch, tmp_path):
    path = tmp_path / "best.pth"
    path.write_bytes(b"")
    _fake_torch(monkeypatch, pickle.UnpicklingError(told))
    with pytest.raises(WeightsError, match=f"best.pth: .*{message}"):
        weights.load(path)


@pytest.mark.parametrize(
    "score", [np.float64(0.7), np.float32(0.7), np.int64(7), np.bool(True)]
)
@pytest.mark.parametrize("core", ["core", "_core"])
def test_scores_that_numpy_pickled_are_allowed_and_no_more(score, core):
    """PyTorch's protocol is 2; the names are those of NumPy 1 or 2."""
    allowed = {}
    for entry in weight_files._scalars():
        if isinstance(entry, tuple):
            allowed[entry[1]] = entry[0]
        else:
            allowed[f"{entry.__module__}.{entry.__qualname__}"] = entry
    text = pickle.dumps(score, protocol=2).replace(b"numpy._core", b"numpy.core")
    text = text.replace(b"numpy.core", f"numpy.{core}".encode())
    asked = {
        argument.replace(" ", ".")
        for code, argument, _ in pickletools.genops(text)
        if code.name == "GLOBAL"
    }
    assert any(core in name for name in asked)
    assert asked <= allowed.keys()
    # PyTorch lets a type be given its state only if the type is allowed itself.
    assert type(score.dtype) in allowed.values()
    assert len(allowed) == 8


def test_teachers_come_first_and_others_by_name(monkeypatch, tmp_path):
    config = NETWORKS["u2pl"]
    arrays, variables = as_published(config)
    other = {key: value + 1 for key, value in arrays.items()}
    path = tmp_path / "ckpt.pth"
    path.write_bytes(b"")
    states = {"model_state": _tensors(other), "teacher_state": _tensors(arrays)}
    _fake_torch(monkeypatch, states)
    assert_equal(weights.load(path).variables, variables)
    student = weights.load(path, "model_state")
    assert student.origin["state"] == "model_state"
    kernel = student.variables["params"]["decoder"]["classifier"]["bias"]
    np.testing.assert_array_equal(
        kernel, variables["params"]["decoder"]["classifier"]["bias"] + 1
    )
    with pytest.raises(WeightsError, match="no 'ema'.*model_state, teacher_state"):
        weights.load(path, "ema")
    for content in ({"epoch": 1}, [1], {}):
        _fake_torch(monkeypatch, content)
        with pytest.raises(WeightsError, match="no state dict"):
            weights.load(path)


def test_one_network_needs_no_choice(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(WeightsError, match="--state=teacher_state is of no use"):
        weights.load(tmp_path / "w.npz", "teacher_state")


def test_writing_is_of_safetensors_alone(tmp_path):
    with pytest.raises(WeightsError, match=r"w.npz: .*as .safetensors"):
        weights.save(tmp_path / "w.npz", _weights(NETWORKS["unimatch"]))
    assert not list(tmp_path.iterdir())
