"""Where a GPU's program would spend its time at the roofline.

Every kernel takes the longer of its bytes at the memory's rate and its FLOPs at the
rate of its products. This is a model, not a measurement: it orders what to look at.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from launch.bench.gpu.devices import Rates
from launch.bench.gpu.hlo import COLLECTIVES, KINDS, Kernel

# XLA writes the path of the module with the transformations around it.
_TRANSFORMED = re.compile(r"\b(?:jvp|transpose|vmap|remat|checkpoint)\(([^()]*)\)")
_CALL = re.compile(r"(?:jit|pjit|pmap)\([^()]*\)/?")
_FIGURES = ("kernels", "seconds", "bytes", "flops")


def seconds(kernel: Kernel, rates: Rates, devices: int = 1) -> float:
    """Computes the time of one run of a kernel at the roofline."""
    if kernel.kind == COLLECTIVES:
        # A ring sends every byte twice, except the device's own share.
        return 2 * (devices - 1) / devices * kernel.result.bytes / rates.link
    if kernel.operands != "f32":
        rate = rates.half
    else:
        rate = rates.single if kernel.exact else rates.tf32
    return max(kernel.bytes / rates.memory, kernel.flops / rate)


def figures(
    kernels: Iterable[Kernel], rates: Rates, devices: int, top: int
) -> dict[str, Any]:
    """Sums kernels to the figures of a program.

    Args:
      kernels: of the program.
      rates: of the GPU.
      devices: number of GPUs that compute together.
      top: number of the most expensive operations of the source to list.

    Returns:
      `kernels`, `seconds`, `bytes` and `flops` per step and device; the same by kind;
      `arithmetic_seconds`, the time of the kernels that arithmetic bounds;
      `widest_window` of a convolution; `top`, the operations that cost most, where
      blocks of a network's layer count as one.
    """
    kinds = {kind: dict.fromkeys(_FIGURES, 0.0) for kind in KINDS}
    sources: dict[tuple[str, str], dict[str, float]] = defaultdict(
        lambda: dict.fromkeys(_FIGURES, 0.0)
    )
    arithmetic, window = 0.0, 0
    for kernel in kernels:
        each = seconds(kernel, rates, devices)
        for sums in (kinds[kernel.kind], sources[kernel.kind, source(kernel.source)]):
            sums["kernels"] += kernel.runs
            sums["seconds"] += kernel.runs * each
            sums["bytes"] += kernel.runs * kernel.bytes
            sums["flops"] += kernel.runs * kernel.flops
        if each > kernel.bytes / rates.memory and kernel.kind != COLLECTIVES:
            arithmetic += kernel.runs * each
        window = max(window, kernel.window)
    dearest = sorted(sources.items(), key=lambda item: -item[1]["seconds"])
    return {
        **{name: sum(sums[name] for sums in kinds.values()) for name in _FIGURES},
        "arithmetic_seconds": arithmetic,
        "widest_window": window,
        "kinds": kinds,
        "top": [
            {"source": path, "kind": kind, **sums}
            for (kind, path), sums in dearest[:top]
        ],
    }


def source(path: str) -> str:
    """Shortens the path of an operation; the blocks of a layer share one.

    >>> source("jit(f)/transpose(jvp(Net.encode))/backbone/jit(g)/layer1_0/conv2/add")
    'Net.encode/backbone/layer1_*/conv2/add (gradient)'
    """
    gradient = " (gradient)" if "transpose(" in path else ""
    previous = None
    while previous != path:
        previous, path = path, _TRANSFORMED.sub(r"\1", path)
    path = _CALL.sub("", path)
    path = re.sub(r"(layer\d+)_\d+", r"\1_*", path)
    return re.sub(r"/+", "/", path).strip("/") + gradient


def table(found: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Formats figures to be read, beside those of an earlier program if there are.

    Args:
      found: result of `figures`, and optionally `peak_bytes`.
      before: the same of another program.
    """
    lines = [_row("", found, before)]
    if "torch" in found:
        lines.append(_row("the same in PyTorch", found["torch"]))
    for kind in KINDS:
        earlier = before["kinds"].get(kind) if before else None
        if found["kinds"][kind]["kernels"] or (earlier and earlier["kernels"]):
            lines.append(_row(kind, found["kinds"][kind], earlier))
    peaks = [
        one["peak_bytes"] for one in (before, found) if one and "peak_bytes" in one
    ]
    if peaks:
        lines.append("peak " + " -> ".join(f"{peak / 1e9:.2f} GB" for peak in peaks))
    if "torch" in found:
        lines.append(f"peak in PyTorch {found['torch']['peak_bytes'] / 1e9:.2f} GB")
    lines.append(f"widest window of a convolution: {found['widest_window']}")
    for row in found["top"]:
        lines.append(_row(f"{row['kind']}: {row['source']}", row, None))
    return "\n".join(lines)


def _row(
    name: str, sums: dict[str, float], before: dict[str, float] | None = None
) -> str:
    def numbers(each: dict[str, float]) -> str:
        return (
            f"{each['seconds'] * 1e3:8.2f} ms {each['bytes'] / 1e9:8.2f} GB "
            f"{each['flops'] / 1e12:7.3f} TFLOP {each['kernels']:6.0f} kernels"
        )

    earlier = f"{numbers(before)}  -> " if before else ""
    return f"{earlier}{numbers(sums)}  {name or 'the step'}"
