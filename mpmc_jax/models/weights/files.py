"""Reads and writes weight files as data: nothing in them is ever executed.

.safetensors and .npz need no other library; .pth goes through PyTorch, of a version
whose `weights_only` can be relied on.
"""

import codecs
import dataclasses
import hashlib
import importlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from mpmc_jax.atomic_write import write_bytes
from mpmc_jax.models.weights import formats
from mpmc_jax.models.weights.formats import WeightsError

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
# Names of networks in checkpoints. The network of the published numbers comes first:
# the teacher of AugSeg and U2PL; AEL's model_state is its teacher.
_STATES = ("teacher_state", "model_ema", "model_state", "state_dict", "model")
_TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The content of a weight file.

    Attributes:
      arrays: arrays by key; floats are float32 or float64.
      metadata: text by name, if the format has it.
      sha256: checksum of the file, hexadecimal.
      state: name of the network if the file has several, else "".
      others: names of the other networks in the file.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    sha256: str
    state: str = ""
    others: tuple[str, ...] = ()


def read(path: pathlib.Path, state: str = "") -> WeightFile:
    """Reads a weight file.

    Args:
      path: path of the file; its suffix, one of `SUFFIXES`, is its format.
      state: which network of a .pth that holds several; "" chooses a teacher.

    Raises:
      WeightsError: the file cannot be used; the message says why.
      FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise WeightsError(f"{path}: weights are read from {', '.join(SUFFIXES)}")
    formats.check_download(path)
    metadata, name, others = {}, "", ()
    try:
        if path.suffix == ".safetensors":
            arrays, metadata = formats.read_safetensors(path)
        elif path.suffix == ".npz":
            arrays = formats.read_npz(path)
        else:
            name, others, arrays = _read_torch(path, state)
        arrays = {key: _at_least_float32(value) for key, value in arrays.items()}
        check_finite(path, arrays)
    except MemoryError:
        raise WeightsError(
            f"{path}: its arrays do not fit into this process's memory; free some, or "
            "raise the process's limit (ulimit -v)"
        ) from None
    if state and state != name:
        raise WeightsError(
            f"{path}: holds one network, so --state={state} is of no use"
        )
    if not arrays:
        raise WeightsError(f"{path}: holds no array")
    return WeightFile(arrays, metadata, checksum(path), name, others)


def write(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes a .safetensors file, whole or not at all.

    Equal arrays and metadata give equal bytes.

    Raises:
      WeightsError: another suffix, or a number that is not finite.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: weights are written as .safetensors")
    check_finite(path, arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = safetensors_numpy.save(dict(arrays), metadata=metadata)
    write_bytes(path, formats.sort_header(content))


def check_finite(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises WeightsError, which names the array, if a number is not finite.

    Numbers beyond float32's range count as well: a network would make them infinite.
    """
    most = np.finfo(np.float32).max
    broken = {}
    for key, value in arrays.items():
        if value.dtype.kind == "f":
            count = value.size - np.count_nonzero(np.abs(value) <= most)
            broken |= {key: count} if count else {}
    if broken:
        key, count = next(iter(broken.items()))
        more = (
            f", and some of {len(broken) - 1} other arrays" if len(broken) > 1 else ""
        )
        raise WeightsError(
            f"{path}: {count} of the {arrays[key].size} numbers of {key!r}{more} are "
            "not finite; use another file, such as an earlier checkpoint"
        )


def checksum(path: pathlib.Path) -> str:
    """Computes the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """Parses a JSON object in the metadata.

    Raises:
      WeightsError: it is missing, or something else.
    """
    try:
        value = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise WeightsError(f"the metadata's {name!r} is no JSON object")
    return value


def _at_least_float32(value: np.ndarray) -> np.ndarray:
    is_half = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4
    return value.astype(np.float32) if is_half else value


def _read_torch(
    path: pathlib.Path, state: str
) -> tuple[str, tuple[str, ...], dict[str, np.ndarray]]:
    """Returns the name of the chosen network, the other names, and its arrays."""
    _check_archive(path)
    torch = _import_torch(path)
    try:
        with torch.serialization.safe_globals(_scalars()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # PyTorch's unpickler raises anything.
        reason = formats.reason_of(error)
        raise WeightsError(
            f"{path}: PyTorch finds no plain weights in it: {reason}"
        ) from error
    states = _find_states(torch, content)
    if not states:
        raise WeightsError(
            f"{path}: holds no state dict, at its top level or one below"
        )
    known = [name for name in _STATES if name in states]
    name = state or next(iter([*known, *states]))
    if name not in states:
        raise WeightsError(f"{path}: no {name!r} in it; there are {', '.join(states)}")
    tensors = states.pop(name)
    # A tensor with strides 0 shows few stored numbers as many.
    claimed = sum(each.numel() * each.element_size() for each in tensors.values())
    formats.check_bytes(path, claimed)
    arrays = {key: _to_numpy(torch, value) for key, value in tensors.items()}
    return name, tuple(states), arrays


def _check_archive(path: pathlib.Path) -> None:
    """Raises WeightsError for archives that are cut, too large or programs.

    Files of PyTorch before 1.6 are not archives; PyTorch itself checks them.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with formats.open_archive(path) as archive:
        claimed = sum(each.file_size for each in archive.infolist())
        formats.check_bytes(path, claimed)
        names = {pathlib.PurePosixPath(name).name for name in archive.namelist()}
    if "constants.pkl" in names:
        raise WeightsError(
            f"{path}: holds a TorchScript program; save its state_dict() as "
            ".safetensors"
        )


def _scalars() -> list[Any]:
    """Lists what unpickles NumPy's numbers, by the names before and since NumPy 2.

    Published checkpoints store their best score as such a number. None of
    these runs code.
    """
    scalar, _ = np.float64().__reduce__()
    kinds = (np.bool, np.int64, np.float32, np.float64)
    return [
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
        codecs.encode,
    ]


def _import_torch(path: pathlib.Path) -> Any:
    fix = f"pip install 'torch>={_TORCH[0]}.{_TORCH[1]}', or save it as .safetensors"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise WeightsError(f"{path}: only PyTorch reads this format; {fix}") from None
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < _TORCH:
        raise WeightsError(
            f"{path}: PyTorch {torch.__version__} can be made to run code by such a "
            f"file; {fix}"
        )
    return torch


def _find_states(torch: Any, content: Any) -> dict[str, Mapping[str, Any]]:
    """Finds state dicts by name: the content itself, named "", or its entries."""

    def is_state(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(key, str) for key in value)
            and all(isinstance(entry, torch.Tensor) for entry in value.values())
        )

    if is_state(content):
        return {"": content}
    if not isinstance(content, Mapping):
        return {}
    return {str(name): entry for name, entry in content.items() if is_state(entry)}


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
