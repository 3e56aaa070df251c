"""Prediction: the class of every pixel of stored images, at full size."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpmc_jax import memory
from mpmc_jax.evaluation.bands import scores_by_band
from mpmc_jax.evaluation.bounded_jit import BoundedJit
from mpmc_jax.evaluation.protocols import EvalProtocol, Slide
from mpmc_jax.evaluation.size_limit import check_size
from mpmc_jax.models.preprocess import normalize, to_unit
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import Array, PyTree

# Images of more pixels are predicted in windows: 4 million are 2000 x 2000.
WINDOW_ABOVE = 4_000_000


def network_input(images: Array, pixels: PixelFormat) -> Array:
    """Stored images (b,h,w,c) -> normalized network input of the same shape."""
    return normalize(to_unit(images, pixels, jnp.result_type(float)), pixels)


class Band(NamedTuple):
    """Predictions of some rows of an image.

    Attributes:
      top: the first row.
      classes: (rows,w) uint8.
      probabilities: (rows,w,C) float32, or None unless they were asked for.
    """

    top: int
    classes: np.ndarray
    probabilities: np.ndarray | None


class Predictor:
    """Segments images; compiles a program per image size (see `BoundedJit`).

    Images of more than `window_above` pixels are predicted in overlapping windows,
    whose programs they share.
    """

    def __init__(
        self,
        module: Any,
        variables: PyTree,
        pixels: PixelFormat,
        protocol: EvalProtocol,
        *,
        devices: Sequence[jax.Device] | None = None,
        window_above: int = WINDOW_ABOVE,
    ):
        """Prepares the prediction.

        Args:
          module: a segmenter.
          variables: its {"params", "batch_stats"}.
          pixels: the format of stored pixels.
          protocol: how images are scored.
          devices: local devices that share a batch; None for the first one alone.
          window_above: number of pixels of the largest image that is predicted as
            `protocol` says; larger ones are predicted in windows.
        """
        self.protocol = protocol.for_prediction()
        self.window_above = window_above
        self._devices = jax.local_devices()[:1] if devices is None else list(devices)
        self._split, variables = _replicate(variables, self._devices)
        self._variables = variables
        self._num_classes = module.num_classes
        self._free = memory.of_devices(self._devices)
        self._normalize = BoundedJit(lambda images: network_input(images, pixels))
        self._forward = BoundedJit(lambda v, images: module.apply(v, images).logits)
        self._choose = BoundedJit(
            lambda scores: jnp.argmax(scores, axis=-1).astype(jnp.uint8)
        )

    def with_variables(self, variables: PyTree) -> "Predictor":
        """Returns the same predictor for other variables; they share programs."""
        other = copy.copy(self)
        _, other._variables = _replicate(variables, self._devices)
        return other

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The class of every pixel: (h,w,c) as stored -> (h,w) uint8.

        Raises:
          ValueError: the image is too large for the device's memory.
        """
        if not self.uses_windows(image.shape[:2]):
            return self.batch(image[None])[0][0]
        return np.concatenate([band.classes for band in self.bands(image)])

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """The probability of every class: (h,w,c) as stored -> (h,w,C).

        Raises:
          ValueError: the image is too large for the device's memory.
        """
        bands = self.bands(image, probabilities=True)
        found = [band.probabilities.copy() for band in bands]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def uses_windows(self, size: tuple[int, int]) -> bool:
        """Whether an image of this size is predicted in windows for its size."""
        large = size[0] * size[1] > self.window_above
        return large and self.protocol.for_large_images() is not None

    @property
    def windows_are_exact(self) -> bool:
        """Whether windows give what the protocol gives, as it has windows itself."""
        protocol = self.protocol
        one_view = protocol.scales == (1.0,) and not protocol.flip
        return isinstance(protocol, Slide) and one_view

    def rows_per_batch(self, size: tuple[int, int], most: int) -> int:
        """How many images of a size share a batch, at most `most` per device.

        A device's part of a batch has no more pixels than the largest single image.
        """
        fit = max(min(self.window_above // (size[0] * size[1]), most), 1)
        return fit * len(self._devices)

    def batch(
        self, images: np.ndarray, *, probabilities: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The classes (b,h,w) uint8 and probabilities (b,h,w,C) of stored images.

        Args:
          images: (b,h,w,c).
          probabilities: whether to return them; else None.

        Raises:
          ValueError: the images are too large for the devices' memory.
        """
        check_size(
            len(images),
            images.shape[1:3],
            images.shape[3] + self._num_classes,
            free=self._free,
            devices=len(self._devices),
        )
        scores = self.protocol.scores(
            self._network, self._normalize(self._place(images))
        )
        classes = np.asarray(self._choose(scores))[: len(images)]
        if not probabilities:
            return classes, None
        found = self.protocol.to_probabilities(scores)
        return classes, np.asarray(found)[: len(images)]

    def bands(
        self, image: np.ndarray, *, probabilities: bool = False, windows: bool = False
    ) -> Iterator[Band]:
        """Yields the predictions of an image from top to bottom.

        There is one band unless the image is predicted in windows.

        Args:
          image: (h,w,c) as stored.
          probabilities: whether to return them; the next band may overwrite them.
          windows: whether to predict an image of any size in windows.

        Raises:
          ValueError: the image is too large for the device's memory.
        """
        if not (windows or self.uses_windows(image.shape[:2])):
            classes, found = self.batch(image[None], probabilities=probabilities)
            yield Band(0, classes[0], None if found is None else found[0])
            return
        protocol = self.protocol.for_large_images()
        assert protocol is not None  # See `uses_windows`.
        rows, columns = image.shape[:2]
        # The classes and pictures, then the scores of one row of windows.
        check_size(1, (rows, columns), 1, free=self._free, devices=1)
        tallest = min(protocol.size, rows)
        depth = image.shape[2] + self._num_classes
        check_size(1, (tallest, columns), depth, free=self._free, devices=1)

        def score(stored: np.ndarray) -> np.ndarray:
            placed = self._normalize(self._place(stored))
            return np.asarray(protocol.scores_of_cut_windows(self._network, placed))[
                : len(stored)
            ]

        found = scores_by_band(
            protocol, score, image, self._num_classes, len(self._devices)
        )
        for top, scores in found:
            classes = scores.argmax(-1).astype(np.uint8)
            if probabilities and not protocol.gives_probabilities:
                scores = scipy.special.softmax(scores, axis=-1)
            yield Band(top, classes, scores if probabilities else None)

    def _place(self, images: np.ndarray) -> Any:
        """Puts images on the devices; black ones fill up the last device's part."""
        missing = -len(images) % len(self._devices)
        if missing:
            filler = np.zeros((missing, *images.shape[1:]), images.dtype)
            images = np.concatenate([images, filler])
        return images if self._split is None else jax.device_put(images, self._split)

    def _network(self, images: Array) -> Array:
        return self._forward(self._variables, images)


def _replicate(
    variables: PyTree, devices: Sequence[jax.Device]
) -> tuple[NamedSharding | None, PyTree]:
    """Puts variables on all devices; also returns how a batch is split over them."""
    if len(devices) == 1:
        return None, jax.device_put(variables, devices[0])
    mesh = jax.make_mesh(
        (len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices
    )
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("batch"))
    return split, jax.device_put(variables, whole)
