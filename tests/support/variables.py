"""Random variables of a network without compiling its initializers."""

import jax
import numpy as np

from mpmc_jax.models import ModelConfig, init_variables


def random_variables(config: ModelConfig, seed: int = 0):
    """Variables of a segmenter, see `random_like`."""
    shapes = jax.eval_shape(lambda key: init_variables(key, config), jax.random.key(0))
    return random_like(shapes, seed)


def random_like(shapes, seed: int = 0):
    """Kernels of variance 2 / fan-in; every vector positive, about one."""
    rng = np.random.default_rng(seed)

    def draw(leaf) -> np.ndarray:
        if len(leaf.shape) == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        deviation = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return (deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(draw, shapes)
