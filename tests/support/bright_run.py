"""A run whose network tells bright pixels from dark ones, without training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import base
from mpmc_jax.data.dataset import DatasetFacts
from mpmc_jax.experiments.run import Run
from mpmc_jax.models import ModelConfig
from mpmc_jax.pixels import RGB
from mpmc_jax.plugins.base import Identity
from mpmc_jax.types import Prediction


class Bright(nn.Module):
    """Class 1 where an image is brighter than its normalization's mean."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, images):
        value = images.mean(-1) + self.param("bias", nn.initializers.zeros, ())
        return Prediction(logits=jnp.stack([-value, value], -1))


def bright_run(names, palette, pixels=RGB, **replaced):
    """A run on images of a format; `replaced` are other values of its fields."""
    module = Bright()
    image = jnp.zeros((1, 4, 4, pixels.channels))
    run = Run(
        config=base.get_base(),
        facts=DatasetFacts("toy", names, palette, pixels, fingerprint="0"),
        model=ModelConfig(num_classes=2),
        module=module,
        variables=module.init(jax.random.key(0), image),
        step=1,
        network_name="a",
        plugin=Identity(),
        probe=None,
        manifest={},
    )
    return dataclasses.replace(run, **replaced)
