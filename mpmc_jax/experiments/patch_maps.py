"""What a run's patch classifier says about images: classes of patches, and lambda_s."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.evaluation.bounded_jit import BoundedJit
from mpmc_jax.evaluation.evaluator import PatchProbe
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import EvalProtocol, resize_nearest
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.models.registry import receptive_field
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.plugins.base import Plugin
from mpmc_jax.types import Array, PyTree

# Images (b,h,w,c) as stored, predicted classes (b,h,w) -> lambda_s of these (b,h,w).
LambdaFn = Callable[[PatchProbe, np.ndarray, np.ndarray], np.ndarray]


class Patches(NamedTuple):
    """Probabilities of the classes in the patches of a batch of images.

    Attributes:
      probabilities: (b,r,c,C) for r x c patches.
      rows: (r,2) first row that a patch covers, and the one after its last.
      columns: (c,2) the same for columns.
    """

    probabilities: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def arrays(self, row: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Returns one image's probabilities, and the pixels that patches cover.

        Args:
          row: of the batch.
          size: rows and columns of the image, which may be smaller than the array.
        """
        found = self.probabilities[row]
        rows, columns = (
            np.minimum(self.rows, size[0]),
            np.minimum(self.columns, size[1]),
        )
        inside = [np.count_nonzero(x[:, 0] < x[:, 1]) for x in (rows, columns)]
        return {
            "probabilities": found[: inside[0], : inside[1]].astype(np.float16),
            "rows": rows[: inside[0]],
            "columns": columns[: inside[1]],
        }


@dataclasses.dataclass(frozen=True)
class PatchClassifier:
    """A run's patch classifier, for images without labels."""

    probe: PatchProbe
    protocol: EvalProtocol
    field: ReceptiveField
    presence: Callable[[PyTree, np.ndarray], Array]
    weigh: LambdaFn

    def classify(self, images: np.ndarray) -> Patches:
        """Returns the classes of the patches of images (b,h,w,c) as stored."""
        found = np.asarray(self.presence(self.probe.variables, images))
        size = images.shape[1:3]
        rows, columns = map(
            self._covered, size, self.protocol.probed_size(size), found.shape[1:3]
        )
        return Patches(found, rows, columns)

    def _covered(self, side: int, probed: int, count: int) -> np.ndarray:
        """Returns the pixels (count,2) of an image's side that patches cover.

        Args:
          side: pixels of the image.
          probed: pixels to which it is resized for the patch classifier.
          count: number of patches.
        """
        multiple = self.probe.multiple
        seen = probed - probed % multiple if probed >= multiple else probed
        spans = self.field.spans(seen, count)
        first, after_last = spans.T * side
        return np.stack([first // probed, -(-after_last // probed)], axis=1)

    def lambda_s(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Returns lambda_s (b,h,w) of the predicted classes (b,h,w) of images."""
        return self.weigh(self.probe, images, classes)


def patch_classifier(run: Run) -> PatchClassifier:
    """Returns the patch classifier of a run that has one."""
    assert run.probe is not None
    pixels, protocol = run.facts.pixels, make_protocol(run.config)
    apply = run.probe.apply

    def presence(variables: PyTree, images: Array) -> Array:
        labels = jnp.zeros(images.shape[:3], jnp.int32)
        seen, targets = protocol.probed(network_input(images, pixels), labels)
        logits, _, _ = apply(variables, seen, targets)
        return jax.nn.sigmoid(logits)

    return PatchClassifier(
        jax.device_put(run.probe),
        protocol,
        receptive_field(run.model, run.plugin.taps[0]),
        BoundedJit(presence),
        lambda_function(run.plugin, protocol, pixels),
    )


def lambda_function(
    plugin: Plugin, protocol: EvalProtocol, pixels: PixelFormat
) -> LambdaFn:
    """Returns the function that computes lambda_s of predictions.

    It weighs each prediction as training would weigh it as a pseudo-label (eq. 5), but
    without dividing by a batch's mean (`mpmc.lambda_scale=mean`).
    """

    def weigh(probe: PatchProbe, images: Array, classes: Array) -> Array:
        size = classes.shape[1:]
        seen, labels = protocol.probed(network_input(images, pixels), classes)
        logits, _, _ = probe.apply(probe.variables, seen, labels)
        return resize_nearest(plugin.weigh_pixels(logits, labels), size=size)

    compiled = BoundedJit(weigh)

    def call(probe: PatchProbe, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        return np.asarray(compiled(probe, images, classes.astype(np.int32)))

    return call
