"""The one file of training that handles devices: maps, replicates, places, fetches.

A global batch of B examples holds G = B / group_size groups; example i belongs to group
i mod G. A device holds whole groups, and every micro-batch holds the same groups
however many devices there are, so nothing that a step draws or ranks depends on them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mpmc_jax import memory
from mpmc_jax.text import quantity
from mpmc_jax.training.config import AXIS
from mpmc_jax.types import PyTree


@jax.jit
def _first_rows(tree: PyTree) -> PyTree:
    """The first row of every leaf, in one program rather than one per shape."""
    return jax.tree.map(lambda x: x[0], tree)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is divided.

    Attributes:
      batch_size: examples over all processes and devices.
      group_size: examples per group.
      micro_batches: parts of the batch.
    """

    batch_size: int
    group_size: int
    micro_batches: int

    def check(self, devices: int, processes: int) -> None:
        """Raises ValueError unless groups divide over parts, devices and processes."""
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                key = "accumulation" if name == "micro_batches" else name
                raise ValueError(f"train.{key}={value}: at least 1 is needed")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"train.batch_size={self.batch_size} is not a multiple of "
                f"train.group_size={self.group_size}"
            )
        groups = self.batch_size // self.group_size
        if devices % processes or groups % (devices * self.micro_batches):
            raise ValueError(
                f"train.batch_size={self.batch_size} makes {groups} groups of "
                f"train.group_size={self.group_size}, which do not divide over "
                f"{devices} devices x train.accumulation={self.micro_batches}; use a "
                f"batch size that is a multiple of "
                f"{self.group_size * devices * self.micro_batches}, or a smaller group"
            )

    def order(self, rows: int, devices: int, processes: int) -> np.ndarray:
        """Returns this process's rows ordered by (device, micro-batch, group, member).

        Process p receives the examples p, p + P, p + 2P ..., so that its row i is a
        member of its local group i mod (G/P).

        Args:
          rows: number of rows of this process: all members of its groups, or one image
            per group.
          devices, processes: numbers of devices and processes.
        """
        groups = self.batch_size // self.group_size // processes
        local_devices = devices // processes
        by_group = np.arange(rows).reshape(-1, groups).T
        split = by_group.reshape(
            self.micro_batches,
            local_devices,
            groups // (self.micro_batches * local_devices),
            rows // groups,
        )
        return split.transpose(1, 0, 2, 3).reshape(-1)


class Parallel:
    """Maps a per-device step over all devices.

    Args:
      kind: "pmap" or "shard_map"; both compute the same numbers.
      layout: how batches are divided.
      devices: how many devices to use, the first ones; 0 means all. Several processes
        must use all.

    Raises:
      ValueError: unknown kind, too many devices, or a batch that does not divide.
    """

    def __init__(
        self,
        kind: str,
        layout: Layout,
        devices: int = 0,
    ) -> None:
        kinds = ("pmap", "shard_map")
        if kind not in kinds:
            raise ValueError(
                f"train.parallel={kind!r} is unknown; valid: {list(kinds)}"
            )
        self.kind = kind
        self.processes = jax.process_count()
        found = jax.devices()
        if devices not in range(len(found) + 1) or (devices and self.processes > 1):
            raise ValueError(
                f"train.devices={devices}: {quantity(len(found), 'device')} in "
                f"{quantity(self.processes, 'process')} found; use 0 for all"
            )
        self.devices = found[:devices] if devices else found
        layout.check(len(self.devices), self.processes)
        self._layout = layout
        # pmap takes and returns this process's part of arrays; shard_map whole arrays.
        held = [d for d in self.devices if d.process_index == jax.process_index()]
        self._local = held
        mesh_devices = held if kind == "pmap" else self.devices
        self._mesh = Mesh(
            np.asarray(mesh_devices), (AXIS,), axis_types=(AxisType.Auto,)
        )

    def memory(self) -> int:
        """Returns the bytes of one device.

        CPU devices share the free host memory equally.
        """
        return memory.of_devices(self._local) // len(self._local)

    def compile(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Maps and compiles a step; its first argument is donated."""
        if self.kind == "pmap":
            return jax.pmap(
                step, axis_name=AXIS, devices=self.devices, donate_argnums=(0,)
            )
        mapped = jax.shard_map(
            step,
            mesh=self._mesh,
            in_specs=(P(), P(AXIS), P()),
            out_specs=P(),
            # The step sums its gradients itself (`losses.reduction.Reduction.sum`).
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=(0,))

    def placing(
        self, arrays: PyTree, make: Callable[[PyTree, PyTree], PyTree]
    ) -> Callable[[PyTree], PyTree]:
        """Returns a `place` that also applies `make(arrays, batch)` on the devices."""
        held = self.replicate(arrays)
        if self.kind == "pmap":
            mapped = jax.pmap(make, axis_name=AXIS, devices=self.devices)
        else:
            specs = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS)}
            mapped = jax.jit(jax.shard_map(make, mesh=self._mesh, **specs))
        return lambda batch: mapped(held, self.place(batch))

    def replicate(self, tree: PyTree) -> PyTree:
        """Copies a host tree to every device.

        Buffers are always new: the step donates them, and the caller keeps its own.
        """
        if self.kind == "pmap":
            count = len(self._local)
            sharding = NamedSharding(self._mesh, P(AXIS))

            def repeated(x: Any) -> np.ndarray:
                x = np.asarray(x)
                return np.broadcast_to(x[None], (count, *x.shape))

            return jax.device_put(jax.tree.map(repeated, tree), sharding)
        sharding = NamedSharding(self._mesh, P())
        return jax.device_put(jax.tree.map(np.array, tree), sharding)

    def place(self, batch: PyTree) -> PyTree:
        """Puts this process's rows of a batch (NumPy) on the devices."""
        devices = len(self.devices)

        def ordered(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return x[self._layout.order(len(x), devices, self.processes)]

        rows = jax.tree.map(ordered, batch)
        sharding = NamedSharding(self._mesh, P(AXIS))
        if self.kind == "pmap":
            count = len(self._local)
            rows = jax.tree.map(lambda x: x.reshape((count, -1) + x.shape[1:]), rows)
            return jax.device_put(rows, sharding)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), rows
        )

    def start_reading(self, tree: PyTree) -> Callable[[], PyTree]:
        """Starts copying a replicated tree; the result waits for it and returns NumPy.

        Adds nothing to the devices' queues: a slice computed there would run only after
        the steps sent since, and reading it would wait for them.
        """
        shards = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
        for shard in jax.tree.leaves(shards):
            shard.copy_to_host_async()

        def read() -> PyTree:
            arrays = jax.tree.map(np.asarray, shards)
            return (
                jax.tree.map(lambda x: x[0], arrays) if self.kind == "pmap" else arrays
            )

        return read

    def fetch(self, tree: PyTree) -> PyTree:
        """Returns one copy of a replicated tree, still on its device."""
        shards = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
        return _first_rows(shards) if self.kind == "pmap" else shards
