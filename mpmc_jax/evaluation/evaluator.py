"""Evaluation by a protocol, at full size: one compiled program per image size.

The result does not depend on the batch size, the order of the images, the devices or
the processes: only images of one size share a batch, and filler rows are labeled 255.
Devices return counts that can be summed; for volumes they return class maps, and one
process handles each volume.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpmc_jax import memory
from mpmc_jax.evaluation import batches, metrics
from mpmc_jax.evaluation.bounded_jit import BoundedJit
from mpmc_jax.evaluation.predict import network_input
from mpmc_jax.evaluation.protocols import EvalProtocol
from mpmc_jax.evaluation.size_limit import check_size
from mpmc_jax.evaluation.slices import Slices, over_processes
from mpmc_jax.evaluation.volumes import VolumeScores
from mpmc_jax.pixels import RGB, PixelFormat
from mpmc_jax.types import Array, PyTree


@struct.dataclass
class PatchProbe:
    """A multi-label classifier of patches that is evaluated along with the network.

    Attributes:
      variables: the first argument of `apply`; traced, so that new values need no
        compilation.
      apply: (variables, normalized images (b,h,w,c), labels (b,h,w)) -> logits
        (b,h',w',C), targets (b,h',w',C) bool, valid (b,h',w') bool, for h' x w'
        patches. Pass the same function every time: a new one is compiled again.
      multiple: `apply` sees the largest multiple of so many rows and columns, and
        pads images with fewer.
    """

    variables: PyTree
    apply: Callable[[PyTree, Array, Array], tuple[Array, Array, Array]] = struct.field(
        pytree_node=False
    )
    multiple: int = struct.field(pytree_node=False, default=1)


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """The result of one evaluation, summed over all processes.

    Attributes:
      confusion: (C,C) int64, true class by predicted class.
      num_images: number of images.
      pad_to: 0 if images kept their size, else the multiple they were padded to.
      seconds: wall time.
      programs: number of distinct input shapes on this process.
      histogram: (2,C,BINS) int64 scores of the patch classifier, or None.
      protocol: the protocol's name.
      volumes: the metrics of whole volumes, if the protocol has them.
    """

    confusion: np.ndarray
    num_images: int
    pad_to: int
    seconds: float
    programs: int
    histogram: np.ndarray | None = None
    protocol: str = EvalProtocol.name
    volumes: VolumeScores | None = None

    def scalars(self, class_names: Sequence[str]) -> dict[str, float]:
        """The metrics by their logged names: `miou`, `iou/<class>`, `patch_map`, ...

        Classes that occur neither in the labels nor in the predictions are left out.
        """
        scalars = {
            "miou": metrics.mean_iou(self.confusion),
            "miou_peer": metrics.mean_iou_peer(self.confusion),
            "pixel_accuracy": metrics.pixel_accuracy(self.confusion),
        }
        ious = metrics.iou(self.confusion)
        for name, value in zip(class_names, ious, strict=True):
            if not np.isnan(value):
                scalars[f"iou/{name}"] = float(value)
        if self.volumes is not None:
            scalars |= self.volumes.scalars(class_names)
        if self.histogram is not None:
            scalars |= _patch_scalars(self.histogram)
        return scalars


def _patch_scalars(histogram: np.ndarray) -> dict[str, float]:
    return {
        "patch_hamming": metrics.hamming_accuracy(histogram),
        "patch_hamming_constant": metrics.constant_hamming_accuracy(histogram),
        "patch_map": metrics.mean_average_precision(histogram),
        "patch_map_constant": metrics.constant_mean_average_precision(histogram),
    }


class Evaluator:
    """Evaluates one network repeatedly, with cached programs (see `BoundedJit`)."""

    def __init__(
        self,
        module: Any,
        num_classes: int,
        *,
        pixels: PixelFormat = RGB,
        batch_size: int,
        pad_to: int = 0,
        protocol: EvalProtocol | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares the evaluation; programs are compiled when they are first needed.

        Args:
          module: a segmenter; `module.apply(variables, images)` gives a Prediction
            at the images' size.
          num_classes: C.
          pixels: the format of stored pixels.
          batch_size: images per call, rounded up to a multiple of the devices.
          pad_to: 0, or pad every image at the right and bottom to multiples of this.
            Images of many sizes then need fewer programs, but padding changes the
            result slightly. Only for protocols that process whole images.
          protocol: how images are evaluated; None for whole images.
          devices: local devices to split a batch over; all by default.

        Raises:
          ValueError: batch_size is not positive or pad_to is negative.
        """
        if batch_size < 1:
            raise ValueError(f"eval.batch_size={batch_size} must be at least 1")
        if pad_to < 0:
            raise ValueError(f"eval.pad_to={pad_to} must be 0 (exact) or positive")
        # Whole images have no use for the size.
        self.protocol = protocol or EvalProtocol(size=1)
        self._devices = jax.local_devices() if devices is None else list(devices)
        self._free = memory.of_devices(self._devices)
        mesh = jax.make_mesh(
            (len(self._devices),),
            ("batch",),
            axis_types=(AxisType.Auto,),
            devices=self._devices,
        )
        self._split = NamedSharding(mesh, PartitionSpec("batch"))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self._batch_size = batch_size
        self._num_classes = num_classes
        self._pixels = pixels
        self._pad_to = pad_to if self.protocol.whole_images else 0
        self._normalize = BoundedJit(lambda images: network_input(images, pixels))
        self._forward = BoundedJit(lambda v, images: module.apply(v, images).logits)
        self._count = BoundedJit(
            functools.partial(_count, num_classes),
            out_shardings=(self._whole, self._whole),
        )
        self._probe = BoundedJit(_score_patches, out_shardings=self._whole)

    def run(
        self,
        variables: PyTree,
        dataset: batches.Dataset,
        probe: PatchProbe | None = None,
    ) -> EvalResult:
        """Evaluates every image of a data set.

        Args:
          variables: {"params", "batch_stats"} of the module.
          dataset: the labeled images. Every process passes the same ones; each
            evaluates a part, and all return the result of the whole.
          probe: the patch classifier, or None.

        Raises:
          ValueError: there is no image, an image and its label differ in size, or
            the protocol needs volumes and there are none.
        """
        if len(dataset) == 0:
            raise ValueError("nothing to evaluate: the split holds no image")
        start = time.perf_counter()
        self.check(dataset)
        plan = self._plan(dataset)
        variables, probe = jax.device_put((variables, probe), self._whole)
        total = _Counts(self._num_classes)
        slices = Slices(dataset) if self.protocol.by_volume else None
        programs: set[tuple[int, ...]] = set()

        def network(images: Array) -> Array:
            programs.add(images.shape)
            return self._forward(variables, images)

        def on_canvas(image: np.ndarray, label: np.ndarray):
            return self.protocol.on_canvas(image, label, self._pixels)

        pending = None
        loaded = batches.load_all(dataset, plan, on_canvas)
        for batch, (host_images, host_labels) in zip(plan, loaded, strict=True):
            images, labels = jax.device_put((host_images, host_labels), self._split)
            found = self._evaluate(network, images, labels, probe)
            # A result is fetched while the next batch is being computed.
            total.add(pending, slices)
            pending = (*found, batch, host_labels)
        total.add(pending, slices)
        return EvalResult(
            confusion=over_processes(total.confusion),
            num_images=len(dataset),
            pad_to=self._pad_to,
            seconds=time.perf_counter() - start,
            programs=len(programs),
            histogram=None if probe is None else over_processes(total.histogram),
            protocol=self.protocol.name,
            volumes=None if slices is None else slices.scores(self._num_classes),
        )

    def check(self, dataset: batches.Dataset) -> None:
        """Checks the images' sizes and volumes, without reading images.

        Raises:
          ValueError: images are too large for the devices' memory, or volumes are
            missing (see `EvalProtocol.check`).
        """
        self.protocol.check(dataset.volumes)
        depth = self._pixels.channels + self._num_classes
        for batch in self._plan(dataset):
            check_size(
                batch.rows,
                batch.size,
                depth,
                free=self._free,
                devices=len(self._devices),
            )

    def _plan(self, dataset: batches.Dataset) -> list[batches.Batch]:
        """This process's batches: every P-th one of P processes, or by volume."""

        def canvas(size: tuple[int, int]) -> tuple[int, int]:
            return self.protocol.canvas(size, self._pad_to)

        settings = (dataset, self._batch_size, len(self._devices), canvas)
        process, processes = jax.process_index(), jax.process_count()
        if not self.protocol.by_volume:
            return batches.plan(*settings)[process::processes]
        return batches.plan(*settings, Slices(dataset).of_process(process, processes))

    def _evaluate(
        self,
        network: Callable[[Array], Array],
        images: Array,
        labels: Array,
        probe: PatchProbe | None,
    ) -> tuple[Array, Array, Array | None]:
        """The confusion matrix, classes and score histogram of one batch."""
        normalized = self._normalize(images)
        scores = self.protocol.scores(network, normalized)
        confusion, classes = self._count(scores, labels)
        if probe is None:
            return confusion, classes, None
        histogram = self._probe(probe, *self.protocol.probed(normalized, labels))
        return confusion, classes, histogram


# Confusion matrix, classes and histogram on the device; the batch and its labels.
_Found = tuple[Array, Array, Array | None, batches.Batch, np.ndarray]


class _Counts:
    """Sums the device's int32 counts in int64, on the host."""

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.histogram = np.zeros((2, num_classes, metrics.BINS), np.int64)

    def add(self, found: _Found | None, slices: Slices | None) -> None:
        if found is None:
            return
        *on_device, batch, labels = found
        confusion, classes, histogram = on_device
        self.confusion += jax.device_get(confusion)
        if histogram is not None:
            self.histogram += jax.device_get(histogram)
        if slices is not None:
            slices.add(batch.indices, jax.device_get(classes), labels)


def _count(num_classes: int, scores: Array, labels: Array) -> tuple[Array, Array]:
    """The confusion matrix and classes of a batch's scores (b,h,w,C)."""
    classes = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    return metrics.confusion_matrix(classes, labels, num_classes), classes


def _score_patches(probe: PatchProbe, images: Array, labels: Array) -> Array:
    return metrics.score_histogram(*probe.apply(probe.variables, images, labels))
