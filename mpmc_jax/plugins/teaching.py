"""What MPMC's teacher hands to its losses, and batches taken apart again."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct

from mpmc_jax.types import Array


@struct.dataclass
class PatchTeaching:
    """What the teacher's head says about one view.

    Attributes:
      target: (b,h,w,C) q_bar of eq. 6, or its decision at 0.5.
      weight: (b,h,w,C) lambda_m.
      lambda_sum, lambda_count: lambda_s over the view's confident pixels, for the log.
    """

    target: Array
    weight: Array
    lambda_sum: Array
    lambda_count: Array


def split_by(joined: Array, parts: Sequence[Array]) -> list[Array]:
    """Takes a concatenation along the first axis apart, as long as `parts` are."""
    ends = list(itertools.accumulate(part.shape[0] for part in parts))
    return jnp.split(joined, ends[:-1])
