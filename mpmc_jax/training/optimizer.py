"""SGD with momentum, decay on every parameter, two learning rates, poly schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mpmc_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Schedule:
    """lr * (1 - t/T) ** power, where t = max(count - lag, 0).

    Attributes:
      lr: rate of the backbone at step 0.
      steps: T, the length of the run.
      power: exponent.
      lag: UniMatch sets its rate after the step, so that it lags by one.
    """

    lr: float
    steps: int
    power: float = 0.9
    lag: int = 0

    def __call__(self, count: ArrayLike) -> Array:
        """The rate of the step after `count` updates."""
        # The default float type: float64 where a test runs in it.
        index = jnp.maximum(jnp.asarray(count) - self.lag, 0).astype(float)
        # Not 1 - t/T, which in float32 leaves few digits of the last rates.
        remaining = jnp.maximum(self.steps - index, 0.0) / self.steps
        return self.lr * remaining**self.power


def rate_multipliers(params: PyTree, head_multiplier: float) -> PyTree:
    """1 for every leaf below a key "backbone", `head_multiplier` for all others."""

    def multiplier(path: tuple, _: Array) -> float:
        names = [getattr(entry, "key", None) for entry in path]
        return 1.0 if "backbone" in names else head_multiplier

    return jax.tree_util.tree_map_with_path(multiplier, params)


def build_optimizer(
    schedule: Schedule,
    *,
    head_multiplier: float,
    momentum: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """torch.optim.SGD's arithmetic: decay joins the gradient before the momentum.

    The rate multiplies the momentum buffer, not what enters it; no Nesterov. Weight
    decay acts on batch-norm parameters and biases too, as in the published methods.
    """

    def scale_by_group() -> optax.GradientTransformation:
        def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
            del params
            factors = rate_multipliers(updates, head_multiplier)
            return jax.tree.map(lambda u, f: u * f, updates, factors), state

        return optax.GradientTransformation(optax.init_empty_state, update)

    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        scale_by_group(),
        optax.scale_by_learning_rate(schedule),
    )
