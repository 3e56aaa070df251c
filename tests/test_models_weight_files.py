"""Files of weights are data: damage and malice are named, and nothing is executed."""

import contextlib
import json
import pickle
import pickletools
import sys
import types
import zipfile

import jax
import numpy as np
import pytest

from mpmc_jax.models import weight_files, weights
from mpmc_jax.models.weight_files import WeightsError
from tests.published import NETWORKS, as_published, save, weights_of


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


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
    weights.save(path, weights_of(NETWORKS["unimatch"]))
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
        weights.save(tmp_path / "w.npz", weights_of(NETWORKS["unimatch"]))
    assert not list(tmp_path.iterdir())
