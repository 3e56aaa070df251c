"""The reduction of per-element losses to scalars, on one device or on many.

The mean over a batch that is spread over devices is a global sum divided by a global
count. Losses take a function `global_sum`, which sums an array over devices: the
identity on one device, and in a parallel step a sum over devices whose gradient is that
of the local part. `Reduction` gives a training step that function, and the pixel counts
of the whole batch.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mpmc_jax import distributed
from mpmc_jax.types import Array

GlobalSum = Callable[[Array], Array]


def identity(x: Array) -> Array:
    """The `global_sum` of a batch on a single device."""
    return x


def ratio(numerator: Array, count: Array | int) -> Array:
    """The quotient, with 0 for the mean of nothing (whose numerator is 0)."""
    return numerator / jnp.maximum(count, 1).astype(numerator.dtype)


def masked_mean(values: Array, where: Array, global_sum: GlobalSum = identity) -> Array:
    """Mean of the values where `where` (bool, same shape) is True; 0 if nowhere."""
    # Integer counts: float32 is exact only up to 2**24, 26 crops of side 801.
    count = global_sum(jnp.sum(where, dtype=jnp.int32))
    return ratio(global_sum(jnp.sum(jnp.where(where, values, 0))), count)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Reduces a micro-batch to its contribution to a mean over the whole batch.

    Contributions add up over micro-batches. Their values are the same on every device;
    their gradients are those of the device's own part, and the step sums the gradients.

    Attributes:
      axis_name: the mapped axis, or None on a single device.
      counts: name of a loss term -> number of pixels (or patches) in the whole batch.
      micro_batches: number of micro-batches in the batch.
    """

    axis_name: str | None = None
    counts: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    micro_batches: int = 1

    def sum(self, x: Array) -> Array:
        """Sums over devices; the gradient is that of this device's part."""
        if distributed.count(self.axis_name) == 1:
            return x
        total = distributed.total(x, self.axis_name)
        return x + jax.lax.stop_gradient(total - x)

    def mean(self, name: str, x: Array) -> Array:
        """This micro-batch's contribution to the mean over the whole batch.

        Args:
          name: the term whose count is the divisor.
          x: () this device's sum.
        """
        return ratio(self.sum(x), self.counts[name])

    def micro_batch_mean(self, x: Array, divisor: Array) -> Array:
        """A mean whose divisor depends on predictions, averaged over micro-batches.

        Args:
          x: () this device's sum.
          divisor: () this device's part of the divisor.
        """
        divisor = self.sum(divisor.astype(x.dtype))
        safe = jnp.where(divisor > 0, divisor, jnp.ones_like(divisor))
        return self.sum(x) / safe / self.micro_batches
