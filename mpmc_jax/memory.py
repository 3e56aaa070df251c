"""How much memory this process may still take."""

import pathlib
import resource
from collections.abc import Sequence

import jax
import psutil

_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")


def available() -> int:
    """Bytes that can be taken now without swapping, under every limit there is.

    The least of the kernel's estimate, of what each control group above this process
    has left (container and batch systems set them), and of the address space that
    RLIMIT_AS leaves.
    """
    free = [psutil.virtual_memory().available, *_left_in_cgroups()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free.append(soft - psutil.Process().memory_info().vms)
    return max(min(free), 0)


def of_devices(devices: Sequence[jax.Device]) -> int:
    """Bytes that devices of one kind have together; CPUs have what is `available`."""
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return available() if limit is None else len(devices) * limit


def _left_in_cgroups() -> list[int]:
    """Limit less use of every group around this process, versions 1 and 2."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # A container may see its own group as the root, under the host's name.
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            if each == root.parent:
                break
            left += _left(each, *names)
    return left


def _left(group: pathlib.Path, limit: str, usage: str, cache: str) -> list[int]:
    """Bytes left in one group; none where it has no limit or cannot be read."""
    try:
        most = int((group / limit).read_text())  # "max" in version 2 for no limit
        used = int((group / usage).read_text())
        statistics = dict(
            line.split() for line in (group / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):
        return []
    # Pages of files that nobody reads now are dropped before anything is killed.
    return [most - used + int(statistics.get(cache, 0))]
