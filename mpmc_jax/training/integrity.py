"""What a tree of arrays is (names, types, shapes) and whether its bytes are intact."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mpmc_jax.types import PyTree


def describe(tree: PyTree) -> dict[str, str]:
    """Name -> type and shape of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def checksum(tree: PyTree) -> int:
    """CRC-32 over names, types, shapes and bytes of all leaves."""
    value = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(array.tobytes(), value)
    return value


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A line for every name whose value is another there (found) than now (wanted)."""
    return [
        f"  {name}: {found.get(name, 'absent')!r} there, "
        f"{wanted.get(name, 'absent')!r} now"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
