"""Prediction: the class of every pixel of stored images, at full size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax import memory
from mpmc_jax.evaluation.bounded_jit import BoundedJit
from mpmc_jax.evaluation.protocols import EvalProtocol
from mpmc_jax.evaluation.size_limit import check_size
from mpmc_jax.models.preprocess import normalize, to_unit
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import Array, PyTree


def network_input(images: Array, pixels: PixelFormat) -> Array:
    """Stored images (b,h,w,c) -> normalized network input of the same shape."""
    return normalize(to_unit(images, pixels, jnp.result_type(float)), pixels)


def predict_classes(module: Any, variables: PyTree, images: Array) -> Array:
    """The most probable class of every pixel.

    Args:
      module: a segmenter; `module.apply(variables, images)` gives a Prediction at
        the images' size.
      variables: {"params", "batch_stats"} of the module.
      images: (b,h,w,c), see `network_input`.

    Returns:
      (b,h,w) int32.
    """
    logits_bhwc = module.apply(variables, images).logits
    return jnp.argmax(logits_bhwc, axis=-1).astype(jnp.int32)


class Predictor:
    """Segments single images; compiles a program per image size (see `BoundedJit`)."""

    def __init__(
        self,
        module: Any,
        variables: PyTree,
        pixels: PixelFormat,
        protocol: EvalProtocol,
    ):
        """Takes a segmenter, its {"params", "batch_stats"}, the pixels and protocol."""
        self._protocol = protocol.for_prediction()
        self._num_classes = module.num_classes
        self._variables = variables
        self._free = memory.of_devices(jax.local_devices()[:1])
        self._normalize = BoundedJit(lambda image: network_input(image[None], pixels))
        self._forward = BoundedJit(lambda v, images: module.apply(v, images).logits)
        self._choose = BoundedJit(
            lambda scores: jnp.argmax(scores[0], axis=-1).astype(jnp.uint8)
        )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The class of every pixel: (h,w,c) as stored -> (h,w) uint8.

        Raises:
          ValueError: the image is too large for the device's memory.
        """
        scores = self._protocol.scores(self._network, self._input(image))
        return np.asarray(self._choose(scores))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """The probability of every class: (h,w,c) as stored -> (h,w,C).

        Raises:
          ValueError: the image is too large for the device's memory.
        """
        images = self._input(image)
        return np.asarray(self._protocol.class_probabilities(self._network, images)[0])

    def _input(self, image: np.ndarray) -> Array:
        """Checks the size of an image and normalizes it: (1,h,w,c)."""
        depth = image.shape[2] + self._num_classes
        check_size(1, image.shape[:2], depth, free=self._free, devices=1)
        return self._normalize(image)

    def _network(self, images: Array) -> Array:
        return self._forward(self._variables, images)
