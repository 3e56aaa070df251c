"""Describes trees of arrays (names, types, shapes, checksum) and compares them."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpmc_jax.types import PyTree


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message says what to do."""


def describe(tree: PyTree) -> dict[str, str]:
    """Maps the name of every leaf to its type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def checksum(tree: PyTree) -> int:
    """Computes the CRC-32 over names, types, shapes and bytes of all leaves."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(array.tobytes(), value)
    return value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns a line per name whose value there (found) differs from now (wanted)."""
    return [
        f"  {name}: {found.get(name, 'absent')!r} there, "
        f"{wanted.get(name, 'absent')!r} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def check_fit(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Checks names, types and shapes: Orbax would silently cut or pad arrays.

    Raises:
      CheckpointError: the checkpoint in `folder` is of another network.
    """
    lines = differences(found, wanted)
    if lines:
        raise CheckpointError(
            f"{folder} is of another network ({len(lines)} arrays differ):\n"
            + "\n".join(lines[:5])
            + "\nUse the settings, data set and code that it was made with, or a new "
            "--workdir."
        )
