"""XLA's flags for tests, apart from what reads the environment."""

import importlib.metadata

# Tiny networks run for milliseconds, so machine code is not optimized; made by the
# older emitters and in one piece it compiles in about half the processor time again.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA ends the process at a flag that it does not know; jaxlib 0.11 dropped this one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def device_flags(count):
    """The flags for so many devices."""
    return " ".join([*QUICK, f"--xla_force_host_platform_device_count={count}"])
