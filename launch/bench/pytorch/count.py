"""UniMatch's step in PyTorch, counted by operation as a GPU's kernels are.

Needs torch. The step runs on meta tensors, which have shapes and no values. Casts of
autocast are left out (the whole network is in the compute dtype), batch norm counts as
a single reading, and every operation as a single kernel: lower bounds.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from launch.bench.gpu import hlo

# They make a view of the same memory, or memory that nothing is written to.
_FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "chunk",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
_KINDS = (
    ("convolution", hlo.CONVOLUTIONS),
    ("mm", hlo.PRODUCTS),
    ("scatter", hlo.SCATTERS),
    ("copy", hlo.COPIES),
    ("clone", hlo.COPIES),
    ("cat", hlo.COPIES),
    ("batch_norm", hlo.REDUCTIONS),
    ("sum", hlo.REDUCTIONS),
    ("mean", hlo.REDUCTIONS),
    ("max", hlo.REDUCTIONS),
)


class _Recorder(TorchDispatchMode):
    """Records every operation on tensors as a kernel, and the bytes that are held.

    Attributes:
      kernels: the operations.
      peak: most bytes of tensors that existed at once, as if each were freed, and its
        memory used again, when nothing refers to it any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[hlo.Kernel] = []
        self.peak = self._held = 0
        self._known: set[int] = set()
        for each in gc.get_objects():
            # Some objects fail when they are asked for their class.
            if issubclass(type(each), torch.Tensor):
                self._hold(each)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name not in _FREE and name.rstrip("_") not in _FREE:
            self.kernels.append(_kernel(func, name, args, kwargs or {}, out))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self._hold(each)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's memory until it is freed, if it is not counted yet."""
        memory = tensor.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(memory, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size


def count_step(step: Callable[[], Any]) -> tuple[list[hlo.Kernel], int]:
    """Lists the operations of a step; it runs once before, to make its state.

    Returns:
      The operations, and the most bytes of tensors that existed at once.
    """
    step()
    with _Recorder() as recorder:
        step()
    return recorder.kernels, recorder.peak


def _kernel(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> hlo.Kernel:
    given, results = (
        [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        for tree in ((args, kwargs), out)
    )
    counts = flop_registry.get(func._overloadpacket)
    flops = float(counts(*args, **kwargs, out_val=out)) if counts else 0.0
    single = any(x.dtype == torch.float32 for x in given if x.ndim > 1)
    return hlo.Kernel(
        kind=next((kind for part, kind in _KINDS if part in name), hlo.FUSIONS),
        name=name,
        source=name,
        result=hlo.Array("u8", (math.prod(results[0].shape) if results else 0,)),
        operands="f32" if single else "bf16",
        exact=False,
        bytes=float(sum(x.numel() * x.element_size() for x in (*given, *results))),
        flops=flops,
    )
