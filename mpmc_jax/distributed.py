"""Sums over the devices that a step is mapped over.

Without a mapped axis, and with one of a single device, they are the values themselves:
XLA for CPUs keeps the hundreds of all-reduces of one device that does not need them.
"""

from typing import TypeVar

from jax import lax

T = TypeVar("T")


def count(axis_name: str | None) -> int:
    """Number of devices along the mapped axis; 1 without one."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def total(tree: T, axis_name: str | None) -> T:
    """Arrays -> their sums over devices."""
    return tree if count(axis_name) == 1 else lax.psum(tree, axis_name)


def mean(tree: T, axis_name: str | None) -> T:
    """Arrays -> their means over devices."""
    return tree if count(axis_name) == 1 else lax.pmean(tree, axis_name)


def gathered(tree: T, axis_name: str | None) -> T:
    """Arrays (n,...) -> those of all devices one after the other, in their order."""
    if count(axis_name) == 1:
        return tree
    return lax.all_gather(tree, axis_name, tiled=True)
