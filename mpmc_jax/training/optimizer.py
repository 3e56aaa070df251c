"""Optimizers by name, with two learning rates, a frozen encoder and a poly schedule."""

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
      lr: rate of the encoder at step 0.
      steps: T, the length of the run.
      power: exponent.
      lag: steps by which the rate lags; 1 for UniMatch, which sets its rate after the
        step.
    """

    lr: float
    steps: int
    power: float = 0.9
    lag: int = 0

    def __call__(self, count: ArrayLike) -> Array:
        """Returns the rate of the step that follows `count` updates."""
        # The default float type: float64 in tests that enable it.
        index = jnp.maximum(jnp.asarray(count) - self.lag, 0).astype(float)
        # Not 1 - t/T, which in float32 would leave the last rates few digits.
        remaining = jnp.maximum(self.steps - index, 0.0) / self.steps
        return self.lr * remaining**self.power


def build_optimizer(
    schedule: Schedule,
    *,
    name: str = "sgd",
    head_multiplier: float,
    weight_decay: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    freeze: str = "",
) -> optax.GradientTransformation:
    """Builds the update rule for the encoder and for everything else.

    The encoder learns at the rate of the schedule, everything else (the decoder and the
    head of the plug-in) at `head_multiplier` times that rate. Weight decay acts on
    batch-norm parameters and biases too, as in the published methods.

    Args:
      schedule: the encoder's rate by step.
      name: a key of `OPTIMIZERS`.
      head_multiplier: factor on the rate of everything but the encoder.
      weight_decay: factor of the parameters in the update.
      momentum: momentum of "sgd".
      betas, eps: decays of the moments of "adamw", and what is added to the root.
      freeze: "encoder" leaves the encoder as it is, and keeps no state for it; ""
        freezes nothing.

    Raises:
      ValueError: an unknown name, or betas outside of [0, 1).
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name={name!r} is unknown; valid: {[*OPTIMIZERS]}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"optimizer.betas={betas}: both must be at least 0 and below 1"
        )
    rule = optax.chain(
        *OPTIMIZERS[name](weight_decay, momentum, betas, eps),
        _scale_heads(head_multiplier),
        optax.scale_by_learning_rate(schedule),
    )
    if not freeze:
        return rule
    return optax.partition({True: optax.set_to_zero(), False: rule}, _is_encoder)


def _sgd(
    weight_decay: float, momentum: float, betas: tuple[float, float], eps: float
) -> tuple[optax.GradientTransformation, ...]:
    """torch.optim.SGD's arithmetic: decay joins the gradient before the momentum.

    The rate multiplies the momentum buffer, not what enters it; no Nesterov.
    """
    del betas, eps
    return optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum)


def _adamw(
    weight_decay: float, momentum: float, betas: tuple[float, float], eps: float
) -> tuple[optax.GradientTransformation, ...]:
    """torch.optim.AdamW's arithmetic: decay joins the update after the moments."""
    del momentum
    first, second = betas
    return (
        optax.scale_by_adam(b1=first, b2=second, eps=eps),
        optax.add_decayed_weights(weight_decay),
    )


# One line per optimizer: its transformations before the learning rate.
OPTIMIZERS = {"sgd": _sgd, "adamw": _adamw}


def _is_encoder(params: PyTree) -> PyTree:
    """Marks every leaf below a key "backbone" with True, all others with False."""

    def is_encoder(path: tuple, _: Array) -> bool:
        return "backbone" in [getattr(entry, "key", None) for entry in path]

    return jax.tree_util.tree_map_with_path(is_encoder, params)


def _scale_heads(head_multiplier: float) -> optax.GradientTransformation:
    """Multiplies the updates of everything but the encoder by `head_multiplier`."""

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
        del params
        factors = jax.tree.map(
            lambda encoder: 1.0 if encoder else head_multiplier, _is_encoder(updates)
        )
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(optax.init_empty_state, update)
