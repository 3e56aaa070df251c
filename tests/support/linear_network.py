"""A network of one matrix at half resolution, whose modes and passes can be told apart.

In train mode its scores are doubled, its dropout masks (of the map "fuse1") multiply
the images, and its one statistic counts passes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.training import objective
from mpmc_jax.types import Features, Prediction


class Doubling:
    """The module of a network at half resolution."""

    def upsample(self, logits, size):
        assert tuple(2 * side for side in logits.shape[1:3]) == tuple(size)
        return logits.repeat(2, axis=1).repeat(2, axis=2)


class Linear(struct.PyTreeNode):
    """(b,h,w,3) -> scores (b,h/2,w/2,c) and embeddings (b,h/2,w/2,d)."""

    matrix: jax.Array
    embedder: jax.Array
    bias: jax.Array
    batch_stats: jax.Array
    train: bool = struct.field(pytree_node=False, default=False)

    module = Doubling()

    def encode(self, images, dropout_keys=None, passes=1):
        del dropout_keys, passes
        return Features({"layer1": images[:, ::2, ::2]}, images.shape[1:3]), self

    def decode(self, features, decoder_dropout=None, passes=1):
        pixels = features.taps["layer1"]
        if self.train and decoder_dropout is not None:
            pixels = pixels * decoder_dropout["fuse1"]
        scores = (2 if self.train else 1) * pixels @ self.matrix + self.bias
        moved = self.replace(batch_stats=self.batch_stats + passes * self.train)
        return Prediction(scores, pixels @ self.embedder, scores / 2, scores), moved

    def frozen(self):
        return jax.lax.stop_gradient(self).replace(train=False)


def network(seed: int, classes: int, channels: int = 5, *, train: bool) -> Linear:
    """Random weights; the constant on the scores is 0."""
    rng = np.random.default_rng(seed)
    return Linear(
        matrix=jnp.asarray(rng.normal(0, 1, (3, classes)), jnp.float32),
        embedder=jnp.asarray(rng.normal(0, 1, (3, channels)), jnp.float32),
        bias=jnp.zeros((1, 1, 1, 1)),
        batch_stats=jnp.zeros(()),
        train=train,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(method, members, student, teacher, inputs, state):
    """Value, (terms, state) and gradient by the student, then targets, statistics."""
    prepared = method.prepare({"student": teacher}, inputs, state)
    targets, moved, state = jax.lax.stop_gradient(prepared)

    def loss(student):
        outputs = method.views(
            {"student": student}, {"student": teacher}, inputs, targets, state
        )
        counts = {k: r.valid.sum() for k, r in method.regions(inputs).items()}
        total, terms = objective.combine(
            outputs,
            outputs.views,
            {},
            Reduction(None, counts),
            objective.SupervisedLoss("ce", members, 0.7, 10),
            scale=method.scale,
            alpha=0.25,
        )
        return total, (terms, outputs.state)

    (value, more), gradient = jax.value_and_grad(loss, has_aux=True)(student)
    return value, more, gradient, (targets, moved)


def scores(linear: Linear, images, masks=None) -> np.ndarray:
    """What the network says at full size, in NumPy."""
    pixels = np.asarray(images)[:, ::2, ::2]
    if linear.train and masks is not None:
        pixels = pixels * np.asarray(masks["fuse1"])
    out = (2 if linear.train else 1) * pixels @ np.asarray(linear.matrix)
    return (out + np.asarray(linear.bias)).repeat(2, axis=1).repeat(2, axis=2)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Per pixel, 0 where void."""
    p = softmax(logits)
    known = label < logits.shape[-1]
    index = np.where(known, label, 0)[..., None]
    return np.where(known, -np.log(np.take_along_axis(p, index, -1)[..., 0]), 0)
