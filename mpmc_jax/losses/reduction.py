"""How per-element losses become scalars, on one device or on many.

A mean over a batch that is spread over devices is a global sum over a global count.
Losses take the sum as an argument, `global_sum`: the identity on one device, a sum over
devices whose gradient stays local in a parallel step. `Reduction` is what a training
step passes on: that sum, and the counts of the whole batch.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mpmc_jax import distributed
from mpmc_jax.types import Array

GlobalSum = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """The `global_sum` of a batch that lies on one device."""
    return x


def ratio(numerator: Array, count: Array) -> Array:
    """The quotient, with 0 for an empty mean (whose numerator is 0)."""
    return numerator / jnp.maximum(count, 1).astype(numerator.dtype)


def masked_mean(values: Array, where: Array, global_sum: GlobalSum = identity) -> Array:
    """Mean of the values at which `where` (bool, same shape) holds; 0 if nowhere."""
    # Integer counts: float32 stops counting at 2**24, which 26 crops of 801 exceed.
    count = global_sum(jnp.sum(where, dtype=jnp.int32))
    return ratio(global_sum(jnp.sum(jnp.where(where, values, 0))), count)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Reduces one device's part of a micro-batch to its share of the whole batch.

    Shares add up over micro-batches. Their values are the same on every device, while
    their gradients are those of the device's own part: the step sums the gradients.

    Attributes:
      axis_name: the mapped axis, or None on a single device.
      counts: name of a loss term -> number of pixels (or patches) of the whole batch.
      micro_batches: number of parts of the batch.
    """

    axis_name: str | None = None
    counts: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    micro_batches: int = 1

    def sum(self, x: Array) -> Array:
        """Sum over devices; its gradient is that of this device's part."""
        if distributed.count(self.axis_name) == 1:
            return x
        total = distributed.total(x, self.axis_name)
        return x + jax.lax.stop_gradient(total - x)

    def mean(self, name: str, x: Array) -> Array:
        """This micro-batch's share of the mean over the whole batch.

        Args:
          name: of the term whose count divides.
          x: () this device's sum.
        """
        return ratio(self.sum(x), self.counts[name])

    def local_mean(self, x: Array, divisor: Array) -> Array:
        """A mean whose divisor depends on predictions, averaged over micro-batches.

        Args:
          x: () this device's sum.
          divisor: () this device's share of the divisor.
        """
        divisor = self.sum(divisor.astype(x.dtype))
        safe = jnp.where(divisor > 0, divisor, jnp.ones_like(divisor))
        return self.sum(x) / safe / self.micro_batches
