"""Reads weight files, whose bytes are checked before any array is read.

The size that a file claims is compared with its real size, with the largest known
weights and with the free memory before memory is allocated for it.
"""

import dataclasses
import io
import json
import math
import pathlib
import re
import reprlib
import zipfile
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from mpmc_jax import memory
from mpmc_jax.text import first_line

# Far larger than every published checkpoint with its optimizer, and every header.
_MOST_BYTES = 16 * 10**9
_MOST_HEADER_BYTES = 16 * 2**20
# NumPy refuses longer headers.
_NPY_HEADER_BYTES = 10_100
# The types in .safetensors files that weights are read from.
_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_ENTRY = {"dtype", "shape", "data_offsets"}
# What is sometimes saved instead of weights: how it begins, what it is, and the fix.
_DOWNLOAD = "download the file itself"
_PAGES = (
    (r"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
    (r"<(!doctype\s+html|html|head|body|script)\b", "a web page (HTML)", _DOWNLOAD),
    (r"<", "XML, such as a server's error message", _DOWNLOAD),
    (r"[\[{]", "JSON, such as a server's error message", _DOWNLOAD),
    (r"", "text, such as a server's error message", _DOWNLOAD),
)


class WeightsError(ValueError):
    """A weight file cannot be used; the message says how to fix it."""


def check_download(path: pathlib.Path) -> None:
    """Raises WeightsError for an empty file, and for text instead of weights."""
    with path.open("rb") as file:
        begin = file.read(1024)
    if not begin:
        raise WeightsError(f"{path}: is empty (0 bytes); download it again")
    # Every format of weights begins with such characters.
    if re.search(rb"[^\t\n\f\r\x1b -\xff]", begin):
        return
    text = begin.decode("utf-8-sig", "replace").strip()
    kind, fix = next(
        (kind, fix)
        for start, kind, fix in _PAGES
        if re.match(start, text, re.IGNORECASE)
    )
    line = " ".join(text.split())[:60]
    raise WeightsError(f"{path}: is {kind}, not weights: {line!r}; {fix}")


def check_bytes(path: pathlib.Path, claimed: int) -> None:
    """Raises WeightsError for arrays larger than any weights or than free memory."""
    if claimed > _MOST_BYTES:
        raise WeightsError(
            f"{path}: claims arrays of {claimed / 1e9:.4g} GB; weights of at most "
            f"{_MOST_BYTES / 1e9:.3g} GB are read"
        )
    available = memory.available()
    if claimed > available:
        raise WeightsError(
            f"{path}: holds {claimed / 1e9:.3g} GB, and {available / 1e9:.3g} GB of "
            "memory are free"
        )


def read_safetensors(
    path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads arrays and metadata of a .safetensors file.

    The format is described at https://github.com/huggingface/safetensors.

    Raises:
      WeightsError: the header disagrees with itself or with the file's size.
    """
    begins = f"{path}: no readable safetensors file: "
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            raise WeightsError(
                f"{begins}it has {size} bytes and claims a header of {length}; it is "
                "cut short or of another kind, download it again"
            )
        entries, metadata = _parse_header(file.read(length), begins)
        end = 0
        for entry in sorted(entries.values(), key=lambda each: each.span):
            if entry.begin != end:
                raise WeightsError(f"{begins}its arrays overlap or leave gaps")
            end = entry.end
        if end != size - 8 - length:
            raise WeightsError(
                f"{begins}its arrays take {end} bytes and {size - 8 - length} are "
                "there; it is cut short or damaged, download it again"
            )
        check_bytes(path, end)
        arrays = {key: each.read(file, 8 + length) for key, each in entries.items()}
    return arrays, metadata


def sort_header(content: bytes) -> bytes:
    """Sorts the keys in the header of a .safetensors file's bytes.

    The library writes metadata in an order that differs between processes.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Type, shape and first byte of an array of a .safetensors file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.begin + math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> tuple[int, int]:
        """The first byte, and the byte after the last one."""
        return self.begin, self.end

    def read(self, file: BinaryIO, start: int) -> np.ndarray:
        """Reads the array; `start` is the byte at which the first array begins."""
        file.seek(start + self.begin)
        return np.fromfile(file, self.dtype, math.prod(self.shape)).reshape(self.shape)


def _parse_header(
    content: bytes, begins: str
) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        header = json.loads(content)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise WeightsError(f"{begins}its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise WeightsError(f"{begins}its metadata is not text by name")
    entries = {}
    for key, entry in header.items():
        try:
            entries[key] = _parse_entry(entry)
        except ValueError as error:
            raise WeightsError(f"{begins}{reprlib.repr(key)} {error}") from error
    return entries, metadata


def _parse_entry(entry: Any) -> _Entry:
    """Parses the header's entry of an array; a ValueError says what is wrong."""
    if not isinstance(entry, dict) or set(entry) != _ENTRY:
        raise ValueError(f"is not described by {', '.join(sorted(_ENTRY))}")
    kind = entry["dtype"]
    if not isinstance(kind, str) or kind not in _SAFETENSORS_TYPES:
        raise ValueError(
            f"is of type {reprlib.repr(kind)}, and weights are read from "
            f"{', '.join(_SAFETENSORS_TYPES)}; save it as F32"
        )
    for name in ("shape", "data_offsets"):
        values = entry[name]
        if not isinstance(values, list) or not all(
            type(value) is int and 0 <= value < 2**63 for value in values
        ):
            raise ValueError(f"has {name} {reprlib.repr(values)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if len(shape) > 32 or not offsets:
        raise ValueError(f"has {len(shape)} axes and offsets {offsets}")
    found = _Entry(_SAFETENSORS_TYPES[kind], tuple(shape), offsets[0])
    if list(found.span) != offsets:
        raise ValueError(f"has shape {shape}, which is not what bytes {offsets} hold")
    return found


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a .npz file.

    Raises:
      WeightsError: its headers disagree with the archive's directory, or it holds
        something other than numbers.
    """
    with open_archive(path) as archive:
        members = archive.infolist()
        check_bytes(path, sum(member.file_size for member in members))
        arrays = {}
        for member in members:
            key = member.filename.removesuffix(".npy")
            try:
                with archive.open(member) as file:
                    arrays[key] = _read_npy(file, member.file_size)
            except MemoryError:
                raise
            except Exception as error:  # Parsers raise anything for damaged files.
                raise WeightsError(
                    f"{path}: no readable .npz file: {reprlib.repr(key)} "
                    f"{reason_of(error)}"
                ) from error
    return arrays


def _read_npy(file: Any, size: int) -> np.ndarray:
    """Reads one array of an archive, of `size` bytes with its header.

    Raises:
      ValueError: it is no array of numbers, or claims another size.
    """
    begin = file.read(_NPY_HEADER_BYTES)
    if not begin.startswith(np.lib.format.MAGIC_PREFIX):
        raise ValueError("is no array")
    stream = io.BytesIO(begin)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"is of version {version} of NumPy's format")
    if dtype.kind not in "biuf":
        raise ValueError(f"holds {dtype}, and weights are numbers")
    if stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"claims shape {shape} of {dtype}, which is not what it holds")
    content = bytearray(begin[stream.tell() :])
    content += file.read()
    found = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="), copy=False)
    return found.reshape(shape, order="F" if fortran else "C")


def open_archive(path: pathlib.Path) -> zipfile.ZipFile:
    """Opens the ZIP archive that a .npz file and most .pth files are.

    Raises:
      WeightsError: the file is no archive, or its end is missing.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        with path.open("rb") as file:
            is_cut = file.read(4) == b"PK\3\4"
        reason = reason_of(error)
        if is_cut:
            reason = (
                f"its end is missing, {path.stat().st_size} bytes are there; the "
                "download broke off, download it again"
            )
        raise WeightsError(
            f"{path}: no readable {path.suffix} file: {reason}"
        ) from error


def reason_of(error: Exception) -> str:
    """Describes a library's error, without its advice to load the file anyway."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked:
        return f"it asks for {asked[1]}, which is no data"
    line = first_line(error).partition(". ")[0]
    is_advice = re.search(r"weights_only|allow_pickle|safe_globals|trust", line)
    return type(error).__name__ if is_advice else line
