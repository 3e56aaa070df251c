"""Patches of validation images, as a run's patch classifier sees them."""

import dataclasses
from collections.abc import Callable

import numpy as np

from mpmc_jax.data.dataset import EvalExample
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import resize_nearest
from mpmc_jax.experiments.evaluation import make_protocol
from mpmc_jax.experiments.run import Run
from mpmc_jax.models.registry import receptive_field
from mpmc_jax.plugins.mpmc.patches import nearest_patch
from mpmc_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class PatchView:
    """An image's patches, with what its patch classifier says about them.

    All maps of pixels have the size at which patches are classified: the image's own,
    or the crop's where the protocol resizes slices. There are r x c patches.

    Attributes:
      label: (h,w) classes of the truth, 255 for void.
      logits: (r,c,C) of the patch classifier.
      targets: (r,c,C) bool, whether a class occurs in the patch.
      valid: (r,c) bool, whether the patch has a labeled pixel.
      rows: (r,2) first row of each patch and the row after its last, in the image.
      columns: (c,2) the same of columns.
      nearest: row and column of the patch of each pixel: (h,), (w,).
    """

    label: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    valid: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    nearest: tuple[np.ndarray, np.ndarray]

    def resized(self, classes: np.ndarray) -> np.ndarray:
        """Resizes classes of the image's own size to the size of `label`."""
        return np.asarray(resize_nearest(classes[None], size=self.label.shape)[0])

    def at_pixels(self, values: np.ndarray) -> np.ndarray:
        """Gives every pixel the value of its patch: (r,c) -> (h,w)."""
        row, column = self.nearest
        return values[row][:, column]

    def count(self, pixels: np.ndarray) -> np.ndarray:
        """Counts the pixels of every patch where (h,w) is True: (r,c)."""
        total = np.zeros([side + 1 for side in pixels.shape], np.int64)
        total[1:, 1:] = pixels.cumsum(0, dtype=np.int64).cumsum(1)
        (top, bottom), (left, right) = self.rows.T, self.columns.T
        by_rows = total[bottom] - total[top]
        return by_rows[:, right] - by_rows[:, left]


def patch_function(run: Run) -> Callable[[EvalExample], PatchView]:
    """Returns the function that classifies the patches of an image.

    The run has a patch classifier, see `SavedRun.classifying`.
    """
    probe, protocol = run.probe, make_protocol(run.config)
    field = receptive_field(run.model, run.plugin.taps[0])

    @bounded_jit()
    def classify(head: PyTree, images: Array, labels: Array):
        images = network_input(images, run.facts.pixels)
        seen, targets = protocol.probed(images, labels)
        return targets, *probe.apply(head, seen, targets)

    def view(example: EvalExample) -> PatchView:
        found = classify(probe.variables, example.image[None], example.label[None])
        label, logits, targets, valid = (np.asarray(x[0]) for x in found)
        grid = list(zip(label.shape, logits.shape[:2], strict=True))
        row, column = (nearest_patch(side, count, field) for side, count in grid)
        rows, columns = (field.spans(side, count) for side, count in grid)
        return PatchView(label, logits, targets, valid, rows, columns, (row, column))

    return view
