"""A one-layer teacher and views of noise for the plug-in's tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.mpmc import MPMC
from mpmc_jax.types import Features, Network, Region, View

SIDE, CLASSES, DEPTH = 17, 4, 6
FIELD, SIZE = ReceptiveField(7, 4, 3), (5, 5)
PLUGIN = MPMC(num_classes=CLASSES, field=FIELD, tap_size=SIZE, width=4)
COEFFICIENTS = {"s1": 1.0, "fp": 2.0, "known": 5.0}


class Encoder(nn.Module):
    """One strided convolution: a tap with the field above."""

    def setup(self):
        self.conv = nn.Conv(DEPTH, (7, 7), 4, padding=3)

    def encode(self, images, *, until=None, train=False, passes=1):
        assert not train and passes == 1, "the teacher's pass is an evaluation"
        return Features({until or "layer1": self.conv(images)}, images.shape[1:3])


def fill(shapes, seed):
    """Positive scales and statistics, kernels of both signs."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim < 2:
            return rng.uniform(0.2, 1.2, leaf.shape).astype(leaf.dtype)
        return rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)


def network():
    module = Encoder()
    shapes = jax.eval_shape(
        lambda: module.init(
            jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), method="encode"
        )
    )
    return Network(module, fill(shapes["params"], seed=0), {})


def region(seed, share=0.9, b=2):
    real = np.random.default_rng(seed).random((b, SIDE, SIDE)) < share
    real[0, 9:] = False  # whole patches of padding
    return Region(valid=jnp.asarray(real), real=jnp.asarray(real))


def make_view(name, seed, teacher):
    rng = np.random.default_rng(seed)
    shape = (2, SIDE, SIDE)
    return View(
        logits=jnp.asarray(rng.normal(size=(*shape, CLASSES)), jnp.float32),
        taps={"layer1": jnp.asarray(rng.normal(size=(2, *SIZE, DEPTH)), jnp.float32)},
        image=jnp.asarray(rng.normal(size=(*shape, 3)), jnp.float32),
        target=jnp.asarray(rng.integers(0, CLASSES, shape), jnp.int32),
        weight=jnp.asarray(rng.random(shape) < 0.6, jnp.float32),
        region=region(seed),
        teacher=teacher,
        name=name,
        coefficient=COEFFICIENTS[name],
        unlabeled=name != "known",
    )
