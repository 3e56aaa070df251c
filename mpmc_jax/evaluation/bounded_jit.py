"""A bounded cache of compiled programs, for images of many sizes.

Each image size needs its own program, because padding would change the result, and a
program takes megabytes of host memory. In a user's data set, every image may have a
different size.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Largest number of programs of one function. The first ones are never evicted, so that
# another evaluation of the same images, in the same order, finds them; if the oldest
# program were always evicted, it would find none. All others share RECENT slots, least
# recently used evicted first. RECENT must cover the shapes that one image size needs
# (each scale with and without a flip, windows and their remainders).
MAX_PROGRAMS = 64
RECENT = 24


class BoundedJit:
    """`jax.jit` of a function that keeps at most `MAX_PROGRAMS` compiled programs.

    Attributes:
      programs: shapes of the arguments -> the function compiled for them.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """Takes the function, and options for `jax.jit`."""
        self.programs: dict[tuple, Callable[..., Any]] = {}
        self._recent: dict[tuple, None] = {}  # the most recently used last
        self._function, self._options = function, options

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Calls the function; keyword arguments are static."""
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(args))
        key = (shapes, *sorted(static.items()))
        if key in self._recent:
            self._recent[key] = self._recent.pop(key)
        if key not in self.programs:
            if len(self.programs) >= MAX_PROGRAMS:
                oldest = next(iter(self._recent))
                del self._recent[oldest], self.programs[oldest]
            if len(self.programs) >= MAX_PROGRAMS - RECENT:
                self._recent[key] = None
            # JAX frees a program only with its function, so each gets a new function.
            self.programs[key] = jax.jit(
                functools.partial(self._function, **static), **self._options
            )
        return self.programs[key](*args)


def bounded_jit(**options: Any) -> Callable[[Callable[..., Any]], BoundedJit]:
    """`BoundedJit` as a decorator."""
    return functools.partial(BoundedJit, **options)
