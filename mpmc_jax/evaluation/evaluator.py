"""Exact evaluation: images at their own size, one program a distinct size.

A result does not depend on the batch size, the order of the images, the devices or
the processes: images of one size share a batch, what fills a batch up carries the
label 255, and everything that leaves the device is a count that adds up.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpmc_jax.evaluation import batches, metrics
from mpmc_jax.evaluation.predict import network_input, predict_classes
from mpmc_jax.pixels import RGB, PixelFormat
from mpmc_jax.types import Array, PyTree


@struct.dataclass
class PatchProbe:
    """A multi-label classifier of patches, evaluated beside the network.

    Attributes:
      variables: what `apply` needs; traced, so that new values compile nothing.
      apply: (variables, normalised images (b,h,w,c), labels (b,h,w)) -> logits
        (b,r,s,C), targets (b,r,s,C) bool, valid (b,r,s) bool. Pass the same
        function every time: another one is another program.
    """

    variables: PyTree
    apply: Callable[[PyTree, Array, Array], tuple[Array, Array, Array]] = struct.field(
        pytree_node=False
    )


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """The counts of one evaluation, over all processes.

    Attributes:
      confusion: (C,C) int64, rows truth, columns prediction.
      num_images: how many images were counted.
      pad_to: 0 where the images kept their own size, else what they were padded to.
      seconds: wall time.
      programs: distinct input shapes on this process.
      histogram: (2,C,BINS) int64 of the patch classifier, or None.
    """

    confusion: np.ndarray
    num_images: int
    pad_to: int
    seconds: float
    programs: int
    histogram: np.ndarray | None = None

    def scalars(self, class_names: Sequence[str]) -> dict[str, float]:
        """The flat figures for a log: `miou`, `iou/<class>`, `patch_map` and so on.

        Classes that occur neither in the labels nor in the predictions are left out.
        """
        figures = {
            "miou": metrics.mean_iou(self.confusion),
            "miou_peer": metrics.mean_iou_peer(self.confusion),
            "pixel_accuracy": metrics.pixel_accuracy(self.confusion),
        }
        ious = metrics.iou(self.confusion)
        for name, value in zip(class_names, ious, strict=True):
            if not np.isnan(value):
                figures[f"iou/{name}"] = float(value)
        if self.histogram is not None:
            figures |= _patch_scalars(self.histogram)
        return figures


def _patch_scalars(histogram: np.ndarray) -> dict[str, float]:
    return {
        "patch_hamming": metrics.hamming_accuracy(histogram),
        "patch_hamming_constant": metrics.constant_hamming_accuracy(histogram),
        "patch_map": metrics.mean_average_precision(histogram),
        "patch_map_constant": metrics.constant_mean_average_precision(histogram),
    }


class Evaluator:
    """Evaluates one network repeatedly; its compiled programs stay with the object."""

    def __init__(
        self,
        module: Any,
        num_classes: int,
        *,
        pixels: PixelFormat = RGB,
        batch_size: int,
        pad_to: int = 0,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Sets up the programs; nothing is compiled before the first image.

        Args:
          module: a segmenter; `module.apply(variables, images)` gives a Prediction
            at the images' size.
          num_classes: C.
          pixels: how images come.
          batch_size: images a call, rounded up to a multiple of the devices.
          pad_to: 0, or pad every image at the right and bottom to multiples of this:
            fewer programs where sizes vary, but the padding leaks a little.
          devices: local devices to spread a batch over; all by default.

        Raises:
          ValueError: batch_size is not positive or pad_to is negative.
        """
        if batch_size < 1:
            raise ValueError(f"eval.batch_size={batch_size} must be at least 1")
        if pad_to < 0:
            raise ValueError(f"eval.pad_to={pad_to} must be 0 (exact) or positive")
        self._devices = jax.local_devices() if devices is None else list(devices)
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
        self._pad_to = pad_to
        self._count = jax.jit(
            functools.partial(_count, module, num_classes, pixels),
            out_shardings=self._whole,
        )

    def run(
        self,
        variables: PyTree,
        source: batches.Source,
        probe: PatchProbe | None = None,
    ) -> EvalResult:
        """Evaluates every image of a source.

        Args:
          variables: {"params", "batch_stats"} of the module.
          source: the labelled images. Every process passes the same one; they share
            the work and all return the sums.
          probe: the patch classifier, where there is one.

        Raises:
          ValueError: the source is empty, or an image and its label differ in size.
        """
        if len(source) == 0:
            raise ValueError("nothing to evaluate: the split holds no image")
        start = time.perf_counter()
        plan = batches.plan(source, self._batch_size, len(self._devices), self._pad_to)[
            jax.process_index() :: jax.process_count()
        ]
        variables, probe = jax.device_put((variables, probe), self._whole)
        total = _Counts(self._num_classes)
        pending = None
        for host_batch in batches.load_all(source, plan):
            images, labels = jax.device_put(host_batch, self._split)
            counts = self._count(variables, images, labels, probe)
            # A result is fetched while the next batch is being computed.
            total.add(pending)
            pending = counts
        total.add(pending)
        return EvalResult(
            confusion=_over_processes(total.confusion),
            num_images=len(source),
            pad_to=self._pad_to,
            seconds=time.perf_counter() - start,
            programs=len({(batch.rows, batch.size) for batch in plan}),
            histogram=None if probe is None else _over_processes(total.histogram),
        )


class _Counts:
    """Sums the device's int32 counts in int64."""

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.histogram = np.zeros((2, num_classes, metrics.BINS), np.int64)

    def add(self, counts: tuple[Array, Array | None] | None) -> None:
        if counts is None:
            return
        confusion, histogram = jax.device_get(counts)
        self.confusion += confusion
        if histogram is not None:
            self.histogram += histogram


def _count(
    module: Any,
    num_classes: int,
    pixels: PixelFormat,
    variables: PyTree,
    images: Array,
    labels: Array,
    probe: PatchProbe | None,
) -> tuple[Array, Array | None]:
    """Confusion matrix and score histogram of one batch of uint8 images."""
    images = network_input(images, pixels)
    classes = predict_classes(module, variables, images)
    confusion = metrics.confusion_matrix(classes, labels, num_classes)
    if probe is None:
        return confusion, None
    logits, targets, valid = probe.apply(probe.variables, images, labels)
    return confusion, metrics.score_histogram(logits, targets, valid)


def _over_processes(counts: np.ndarray) -> np.ndarray:
    """The sum of every process's int64 counts."""
    if jax.process_count() == 1:
        return counts
    # JAX would cut int64 to int32, so the two halves travel as they are.
    halves = multihost_utils.process_allgather(counts.view(np.int32))
    return np.asarray(halves).view(np.int64).sum(0)
