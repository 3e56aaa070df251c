"""XLA's flags for tests, apart from what reads the environment."""

# Tiny networks run for milliseconds, so machine code is not optimized; made by the
# older emitters and in one piece it compiles in about half the processor time again.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def device_flags(count):
    """For so many devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
