"""Compiled programs for many image sizes, of which a bounded number is kept.

Each size of image needs a program of its own (padding would change the result), and a
program takes megabytes of the host's memory. Natural images have as many sizes as a
user has images.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Programs of one function. The first ones are kept for good: an evaluation that goes
# through all sizes again finds them, and would find none if the oldest always went.
# The others take turns in RECENT places, which must hold all shapes that one size of
# image needs (a scale and a flip each, windows and their remainders).
MAX_PROGRAMS = 64
RECENT = 24


class BoundedJit:
    """`jax.jit` of a function that keeps the programs of `MAX_PROGRAMS` shapes.

    Attributes:
      programs: shapes of the arguments -> the function compiled for them.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """Takes the function, and what `jax.jit` takes beside it."""
        self.programs: dict[tuple, Callable[..., Any]] = {}
        self._recent: dict[tuple, None] = {}  # in order of use, the latest last
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
            # JAX frees a program with the function that it was made of: a new one.
            self.programs[key] = jax.jit(
                functools.partial(self._function, **static), **self._options
            )
        return self.programs[key](*args)


def bounded_jit(**options: Any) -> Callable[[Callable[..., Any]], BoundedJit]:
    """`BoundedJit` as a decorator."""
    return functools.partial(BoundedJit, **options)
