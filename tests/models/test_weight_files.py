"""Files of weights are data: damage and malice are named, and nothing is executed."""

import contextlib
import io
import json
import pickle
import pickletools
import sys
import types
import zipfile

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpmc_jax.models.weights import convert, formats
from mpmc_jax.models.weights import files as weight_files
from mpmc_jax.models.weights.files import WeightsError
from tests.support.published import NETWORKS, as_published, save, weights_of


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
    with pytest.raises(WeightsError, match="w.npz.*holds object, and weights are num"):
        convert.load(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("conv1.weight.npy", pickle.dumps(_Bomb(proof)))
    with pytest.raises(WeightsError, match="v.npz"):
        convert.load(tmp_path / "v.npz")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.npz", b"PK\3\4 and no end", "its end is missing, 15 bytes are there"),
        ("w.npz", b"\x93NUMPY\1\0", "no readable .npz file: File is not a zip file$"),
        ("w.pth", b"PK\3\4 and no end", "its end is missing, 15 bytes are there"),
        ("w.npz", b"", "is empty .0 bytes.; download it again"),
        ("w.pth", b"", "is empty .0 bytes.; download it again"),
        ("w.safetensors", b"", "is empty .0 bytes.; download it again"),
        ("w.safetensors", b"\x08\0\0", "it has 3 bytes and claims a header of 8"),
        ("w.safetensors", (2**62).to_bytes(8, "little") + b"{}", "no readable safeten"),
        ("w.h5", b"", "weights are read from .safetensors"),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*{message}"):
        convert.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        convert.load(tmp_path / "nothing.npz")


_PAGES = {
    "web page": b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html>cannot scan this file</html>",
    "in GBK": "<HTML><p>\u4e0b\u8f7d</p>".encode("gbk"),
    "XML": b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
    "JSON": b'{"error": "Repository not found"}',
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "text": b"404: Not Found",
}


@pytest.mark.parametrize("suffix", weight_files.SUFFIXES)
@pytest.mark.parametrize("kind", _PAGES)
def test_what_a_server_sent_instead_is_told(kind, suffix, tmp_path):
    path = tmp_path / f"resnet50{suffix}"
    path.write_bytes(_PAGES[kind])
    with pytest.raises(WeightsError) as told:
        convert.load(path)
    (line,) = str(told.value).splitlines()
    name = "web page" if kind == "in GBK" else kind
    assert (
        line.startswith(f"{path}: is ") and name in line and ", not weights: " in line
    )
    mend = "run `git lfs pull`" if kind == "Git LFS" else "download the file itself"
    assert line.endswith(mend)
    assert not any(
        advice in line for advice in ("allow_pickle", "weights_only", "trust")
    )


def _safetensors(path, entries, data=b"", metadata=None):
    """A file with a header as given, whatever its arrays are."""
    header = {
        key: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True))
        for key, entry in entries.items()
    }
    if metadata is not None:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("F8_E4M3", [4], [0, 4]), "'a' is of type 'F8_E4M3', and weights are read"),
        (("F4", [8], [0, 4]), "'a' is of type 'F4'"),
        ((["F32"], [1], [0, 4]), r"'a' is of type \['F32'\]"),
        (("F32", [40_000_000_000], [0, 4]), "not what bytes .0, 4. hold"),
        (("F32", [2**62, 2**62], [0, 4]), "not what bytes .0, 4. hold"),
        (("F32", [-1], [0, 4]), r"has shape \[-1\]"),
        (("F32", [True], [0, 4]), r"has shape \[True\]"),
        (("F32", [1], [4, 8]), "overlap or leave gaps"),
        (("F32", [1], [4, 0]), "not what bytes"),
        (("F32", [1], "04"), "has data_offsets '04'"),
        (("F32", [1], []), "has 1 axes and offsets"),
        (("F32", [2**35], [0, 2**37]), "its arrays take 137438953472 bytes and 4 are"),
        (("F32", [2], [0, 8]), "take 8 bytes and 4 are there; it is cut short"),
    ],
)
def test_headers_that_lie_are_refused_before_room_is_made(entry, message, tmp_path):
    path = _safetensors(tmp_path / "w.safetensors", {"a": entry}, bytes(4))
    with pytest.raises(WeightsError, match=f"w.safetensors: .*{message}"):
        weight_files.read(path)


@pytest.mark.parametrize("metadata", [None, {"a": 1}, {"a": None}, [1], "x", {"a": {}}])
def test_metadata_is_text_or_refused(metadata, tmp_path):
    entries = {"a": ("F32", [1], [0, 4])}
    path = _safetensors(tmp_path / "w.safetensors", entries, bytes(4), metadata)
    if metadata is None:
        assert weight_files.read(path).metadata == {}
        return
    with pytest.raises(WeightsError, match="its metadata is not text by name"):
        weight_files.read(path)


def test_a_header_is_never_larger_than_its_limit(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:  # All holes: it takes no room on the disk.
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)
    with pytest.raises(WeightsError, match="claims a header of 17179869184"):
        weight_files.read(path)
    for content in (b"[" * 100_000, b"[]", b"\xff\xfe", b"{"):
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(WeightsError, match="its header is no JSON object"):
            weight_files.read(path)


def test_bfloat16_is_read(tmp_path):
    values = np.array([1.5, -2.0, 0.0], np.float32)
    content = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    entries = {"b": ("I64", [], [6, 14]), "a": ("BF16", [3], [0, 6])}
    path = _safetensors(
        tmp_path / "w.safetensors", entries, content + (7).to_bytes(8, "little")
    )
    found = weight_files.read(path).arrays
    np.testing.assert_array_equal(found["a"], values)
    assert found["a"].dtype == np.float32 and found["b"] == 7


def _npz(path, shape, dtype="<f4", data=b"\0" * 4):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"shape": shape, "fortran_order": False, "descr": dtype}
        )
        with archive.open("conv1.weight.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            file.write(data)
    return path


def test_arrays_of_an_npz_are_as_large_as_they_claim(tmp_path):
    path = _npz(tmp_path / "w.npz", (40_000_000_000,))
    with pytest.raises(WeightsError, match=r"claims shape \(40000000000,\) of float32"):
        weight_files.read(path)
    assert weight_files.read(_npz(path, (1,))).arrays["conv1.weight"] == 0
    big = np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3))
    np.savez_compressed(path, a=big, b=np.zeros((0, 3)))
    found = weight_files.read(path).arrays
    np.testing.assert_array_equal(found["a"], big)
    assert found["a"].dtype == np.float64 and found["b"].shape == (0, 3)
    for dtype, kind in (("<c8", "complex64"), ("<U3", "<U3"), ("<M8[s]", "datetime64")):
        _npz(path, (1,), dtype, bytes(np.dtype(dtype).itemsize))
        with pytest.raises(WeightsError, match=f"holds {kind}.*, and weights are numb"):
            weight_files.read(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_archives_that_would_unpack_to_more_than_weights_are_refused(
    suffix, tmp_path, monkeypatch
):
    path = tmp_path / f"w{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    assert path.stat().st_size < 10**4
    monkeypatch.setattr(formats, "_MOST_BYTES", 10**6 - 1)
    with pytest.raises(WeightsError, match=r"claims arrays of 0.001 GB; weights of at"):
        weight_files.read(path)
    monkeypatch.setattr(formats, "_MOST_BYTES", 10**7)
    monkeypatch.setattr(formats.memory, "available", lambda: 10**5)
    with pytest.raises(WeightsError, match="holds 0.001 GB, and 0.0001 GB of memory"):
        weight_files.read(path)


def test_a_torchscript_program_is_no_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(WeightsError, match=r"w.pt: holds a TorchScript program; save"):
        weight_files.read(tmp_path / "w.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(value, suffix, tmp_path):
    arrays = {"a": np.ones(3), "b": np.array([1, value, value]), "n": np.arange(2)}
    path = tmp_path / f"w{suffix}"
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    with pytest.raises(
        WeightsError, match=rf"w{suffix}: 2 of the 3 numbers of 'b' are not finite"
    ):
        weight_files.read(path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    model = NETWORKS["unimatch"]
    found = weights_of(model)
    kernel = found.variables["params"]["decoder"]["classifier"]["kernel"].copy()
    kernel.flat[1] = np.nan
    found.variables["params"]["decoder"]["classifier"]["kernel"] = kernel
    with pytest.raises(WeightsError, match=r"1 of .* 'params/decoder/classifier/kern"):
        convert.save(tmp_path / "w.safetensors", found)
    assert not list(tmp_path.iterdir())


def test_a_negative_variance_is_refused(tmp_path):
    arrays, _ = as_published(NETWORKS["unimatch"], counters=False)
    key = "backbone.layer1.0.bn1.running_var"
    arrays[key] = arrays[key] * 0 - 1
    with pytest.raises(WeightsError, match="variance .*backbone/layer1_0.* is -1.0"):
        convert.load(save(tmp_path / "w.safetensors", arrays))


def test_memory_that_ends_while_a_file_is_read_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.zeros(3))

    def full(*args):
        raise MemoryError

    monkeypatch.setattr(formats, "_read_npy", full)
    with pytest.raises(
        WeightsError, match="w.npz: its arrays do not fit into this pro"
    ):
        weight_files.read(path)


def test_an_empty_file_holds_nothing(tmp_path):
    np.savez(tmp_path / "w.npz")
    with pytest.raises(WeightsError, match="holds no array"):
        convert.load(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "9"}, "format version '9'"),
        ({"model": "{"}, "'model' is no JSON object"),
        ({"model": "__import__('os').system('true')"}, "'model' is no JSON object"),
        ({"model": '{"name": "unet"}'}, "metadata's model has"),
        ({"model": ("width", "4")}, "width='4'"),
        ({"model": ("width", True)}, "width=True"),
        ({"model": ("width", None)}, "width=None"),
        ({"model": ("width", 4 * 10**30)}, "of another shape"),
        ({"model": ("width", 0)}, "must be >= 1"),
        ({"model": "[" * 100_000}, "'model' is no JSON object"),
        ({"model": "null"}, "'model' is no JSON object"),
        ({"origin": "[]"}, "'origin' is no JSON object"),
        ({"whole": "null"}, "'whole' is neither true nor false"),
        ({"model": ("width", 8)}, "of another shape"),
        ({"model": ("backbone", "resnet9")}, "valid are"),
    ],
)
def test_our_own_files_are_checked_too(changes, message, tmp_path):
    path = tmp_path / "w.safetensors"
    convert.save(path, weights_of(NETWORKS["unimatch"]))
    file = weight_files.read(path)
    for name, value in changes.items():
        if isinstance(value, tuple):
            value = json.dumps(json.loads(file.metadata[name]) | {value[0]: value[1]})
        file.metadata[name] = value
    weight_files.write(path, file.arrays, file.metadata)
    with pytest.raises(WeightsError, match=message):
        convert.load(path)


def test_a_file_from_before_image_sizes_were_described_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = weights_of(NETWORKS["unimatch"])
    convert.save(path, weights)
    file = weight_files.read(path)
    described = json.loads(file.metadata["model"])
    assert described.pop("image_size") == weights.model.image_size
    file.metadata["model"] = json.dumps(described)
    weight_files.write(path, file.arrays, file.metadata)
    assert convert.load(path).model == weights.model


def test_half_precision_becomes_single(tmp_path):
    arrays, _ = as_published(NETWORKS["unimatch"], counters=False)
    halves = {key: value.astype(np.float16) for key, value in arrays.items()}
    found = convert.load(save(tmp_path / "w.safetensors", halves))
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

    def numel(self):
        return self._array.size

    def element_size(self):
        return self._array.itemsize


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
    path.write_bytes(b"\x80\2 as PyTorch wrote it")
    calls = _fake_torch(
        monkeypatch, {"model": _tensors(arrays), "epoch": 3, "optimizer": {"state": {}}}
    )
    found = convert.load(path)
    assert calls == [{"map_location": "cpu", "weights_only": True}]
    assert found.origin["state"] == "model"
    chex.assert_trees_all_equal(found.variables, variables)


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cu117"])
def test_a_pytorch_that_can_be_tricked_is_not_used(version, monkeypatch, tmp_path):
    path = tmp_path / "best.pth"
    path.write_bytes(pickle.dumps(_Bomb(tmp_path / "proof")))
    calls = _fake_torch(monkeypatch, {}, version)
    with pytest.raises(WeightsError, match=r"best.pth: PyTorch .*torch>=2\.6"):
        convert.load(path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"best.pth: only PyTorch .*torch>=2\.6"):
        convert.load(path)
    assert not calls and not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("Weights only load failed. Re-run with\nlong", "Weights only load failed$"),
        ("x\nWeightsUnpickler: GLOBAL posix.mkdir was not", "asks for posix.mkdir, wh"),
        ("", "UnpicklingError$"),
        ("Cannot use ``weights_only=True`` with it", "in it: UnpicklingError$"),
        ("set allow_pickle=True if you trust it", "in it: UnpicklingError$"),
    ],
)
def test_what_pytorch_refuses_is_one_line(told, message, monkeypatch, tmp_path):
    path = tmp_path / "best.pth"
    path.write_bytes(b"\x80\2")
    _fake_torch(monkeypatch, pickle.UnpicklingError(told))
    with pytest.raises(WeightsError, match=f"best.pth: .*{message}"):
        convert.load(path)


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


def test_a_tensor_of_few_numbers_that_claims_many_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"\x80\2")
    wide = np.broadcast_to(np.float32(1), (200_000, 200_000))
    _fake_torch(monkeypatch, {"conv1.weight": _Tensor(wide)})
    with pytest.raises(WeightsError, match="w.pth: claims arrays of 160 GB"):
        weight_files.read(path)


def test_teachers_come_first_and_others_by_name(monkeypatch, tmp_path):
    config = NETWORKS["u2pl"]
    arrays, variables = as_published(config)
    other = {key: value + 1 for key, value in arrays.items()}
    path = tmp_path / "ckpt.pth"
    path.write_bytes(b"\x80\2")
    states = {"model_state": _tensors(other), "teacher_state": _tensors(arrays)}
    _fake_torch(monkeypatch, states)
    chex.assert_trees_all_equal(convert.load(path).variables, variables)
    student = convert.load(path, "model_state")
    assert student.origin["state"] == "model_state"
    kernel = student.variables["params"]["decoder"]["classifier"]["bias"]
    np.testing.assert_array_equal(
        kernel, variables["params"]["decoder"]["classifier"]["bias"] + 1
    )
    with pytest.raises(WeightsError, match="no 'ema'.*model_state, teacher_state"):
        convert.load(path, "ema")
    for content in ({"epoch": 1}, [1], {}):
        _fake_torch(monkeypatch, content)
        with pytest.raises(WeightsError, match="no state dict"):
            convert.load(path)


def test_one_network_needs_no_choice(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(WeightsError, match="--state=teacher_state is of no use"):
        convert.load(tmp_path / "w.npz", "teacher_state")


def test_writing_is_of_safetensors_alone(tmp_path):
    with pytest.raises(WeightsError, match=r"w.npz: .*as .safetensors"):
        convert.save(tmp_path / "w.npz", weights_of(NETWORKS["unimatch"]))
    assert not list(tmp_path.iterdir())
