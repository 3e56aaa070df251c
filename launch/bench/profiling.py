"""A trace of a program's steps, and which of its operations took the time."""

import collections
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax

# `%name = ... metadata={... op_name="jit(step)/..." ...}` of a program's text.
_NAMED = re.compile(r'%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)"')


def trace(folder: pathlib.Path, function: Callable[[], Any], text: str, top: int = 10):
    """Runs a function under the profiler and reads the trace that it leaves.

    Args:
      folder: where the trace goes; TensorBoard and Perfetto show it.
      function: what is traced; it waits for its results.
      text: the compiled program's, which says what its operations are for.
      top: how many operations to return.

    Returns:
      The most expensive first: name, what it computes, seconds, and share of all
      operations' seconds (which overlap where a device runs several).
    """
    with jax.profiler.trace(str(folder)):
        function()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime_ns)
    seconds = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    seconds[str(operation)] += event.duration_ns / 1e9
    meanings = dict(_NAMED.findall(text))
    total = sum(seconds.values())
    return [
        {
            "operation": name,
            "computes": meanings.get(name, ""),
            "seconds": each,
            "share": each / total,
        }
        for name, each in seconds.most_common(top)
    ]
