"""NVIDIA GPUs that need not be there: descriptions, rates, and XLA's compiler for them.

XLA compiles for a GPU from its description alone. Its plug-in brings cuDNN, cuBLAS and
the assembler; no driver is needed.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mpmc_jax.text import did_you_mean

# Without a GPU nothing can be timed, so XLA takes its default algorithms, and of Triton
# products a default tiling, which it does not find for each shape.
COMPILER_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    # Kernels are counted and not run, so their machine code may be slow.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_gpu_disable_gpuasm_optimizations": True,
}
_PLUGIN = "jax_cuda12_plugin"


class Rates(NamedTuple):
    """Data-sheet rates of a GPU, without sparsity.

    Attributes:
      memory: bytes per second.
      half: FLOPs per second of products of bfloat16 or float16.
      tf32: of float32 products that are rounded to TF32.
      single: of exact float32 products.
      link: bytes per second to other GPUs of the machine, in one direction.
    """

    memory: float
    half: float
    tf32: float
    single: float
    link: float


RATES = {
    "a100": Rates(2.039e12, 312e12, 156e12, 19.5e12, 300e9),
    "h100": Rates(3.35e12, 989e12, 495e12, 67e12, 450e9),
    "h200": Rates(4.8e12, 989e12, 495e12, 67e12, 450e9),
}


def parse_topology(topology: str) -> tuple[str, int] | None:
    """Splits "h100:8" into name and number of GPUs; None for a TPU's topology.

    Raises:
      ValueError: the name of a GPU without a number of them, or of one not known here.
    """
    found = re.fullmatch(rf"({'|'.join(RATES)}):([1-9]\d*)", topology)
    if found:
        return found.group(1), int(found.group(2))
    # TPUs are called v4, v5e and so on.
    if topology and not re.match(r"v\d", topology):
        names = [f"{name}:1" for name in RATES]
        hint = did_you_mean(topology, names)
        raise ValueError(
            f"--topology={topology}: {hint}GPUs are {', '.join(names)} or more of one, "
            "TPUs are like v5e:4x4"
        )
    return None


def absent_gpus(name: str, count: int) -> Sequence[Any]:
    """Returns devices of one machine with `count` GPUs, to be compiled for.

    Raises:
      ValueError: JAX's plug-in for CUDA is not installed.
    """
    if importlib.util.find_spec(_PLUGIN) is None:
        raise ValueError(
            f"--topology={name}:{count} needs XLA's compiler for GPUs, and no GPU: "
            f'pip install "jax[cuda12]=={jax.__version__}"'
        )
    # The plug-in would refuse to load where no driver is installed.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x1x{count}",
        target_config=_description(name),
    )
    return described.devices


def name_of(device_kind: str) -> str | None:
    """Finds the key of `RATES` for JAX's name of a device; None if it is not there."""
    for name in RATES:
        if f'"{device_kind}"' in _description(name):
            return name
    return None


def memory_bytes(name: str) -> int:
    """Returns the bytes of a GPU's memory."""
    found = re.search(r"device_memory_size: (\d+)", _description(name))
    if found is None:
        raise ValueError(f"{name}.txtpb states no device_memory_size")
    return int(found.group(1))


def _description(name: str) -> str:
    return (Path(__file__).parent / f"{name}.txtpb").read_text()
