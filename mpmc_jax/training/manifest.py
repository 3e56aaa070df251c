"""The manifest of a run: what its results depend on besides its configuration."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def make_manifest(seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Collects versions, devices, seed, data fingerprint and revision of a run."""
    devices = jax.devices()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
        "seed": seed,
        "data": data,
        "revision": git_revision(),
    }


def git_revision() -> str:
    """Returns the git revision of this code, with "-dirty" if files differ from it.

    If the code was copied without its history, returns $MPMC_REVISION.
    """
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MPMC_REVISION", "unknown")
