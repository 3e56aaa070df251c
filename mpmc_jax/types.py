"""The data types that the parts exchange, and the legend of shape suffixes.

Array names end in the letters of their axes:

    b     examples on one device
    g     groups of examples, as on one GPU of the published run (`train.group_size`)
    h, w  rows and columns of the array in question
    c     image channels or classes; i, o input and output channels of a kernel
    k     rows, and columns, of a kernel
    d     feature channels
    n     items of a flat list (the pixels of a map, the negatives of an anchor)
    m     anchors per class
    p     parts of the channels, or passes through a network that are one batch
    1, 4  an axis of that length

So `logits_bhwc` are class scores and `label_bhw` a label map. In docstrings, C
stands for the classes where c stands for image channels, and (H,W) for the size of a
whole image where (h,w) is a smaller one. Everything here is plain data or, in
`Network`, a Flax module with its variables: nothing depends on the training loop or on
files.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
from flax import struct

Array = jax.Array
PyTree = Any

IGNORE_LABEL = 255

# The losses that a view may have, see `training.objective.view_loss`.
ViewLoss = Literal["ce", "balanced_ce", "dice"]
VIEW_LOSSES: tuple[ViewLoss, ...] = get_args(ViewLoss)


class Crops(struct.PyTreeNode):
    """The crops of one stream in a batch, with random geometry but no color changes.

    Attributes:
      image: (b,h,w,c), uint8; labeled crops keep the stored type: uint8, uint16 or
        float32. With `data.resident` the host's batches hold crop plans
        here (`data.crop_plan`), which the device turns into pixels.
      extent: (b,4) int32, the rectangle of real pixels (top, left, bottom, right);
        everything outside is padding.
      index: (b,) int32, the example's position in its id list.
      batch_index: (b,) int32, the example's position in the global batch. Random keys
        derive from it, never from a device number.
      label: (b,h,w) uint8 with 255 for void, or None for unlabeled crops.
    """

    image: Array
    extent: Array
    index: Array
    batch_index: Array
    label: Array | None = None


class Batch(struct.PyTreeNode):
    """The crops of one optimizer step.

    Attributes:
      labeled: crops with labels.
      unlabeled: crops without labels, or None for a supervised method.
      partner: a crop to mix with each unlabeled one, or None. It comes from the same
        image (UniMatch), from another one (UniMatch on ACDC), or from one that the
        method requested some steps ago (AEL); see `Streams.partner`.
      source: labeled crops to copy objects from (AEL), or None; a crop is entirely
        void if nothing is copied.
    """

    labeled: Crops
    unlabeled: Crops | None = None
    partner: Crops | None = None
    source: Crops | None = None


class Features(struct.PyTreeNode):
    """The feature maps that an encoder passes to a decoder.

    Attributes:
      taps: name of the layer -> (b,h,w,d) map.
      size: rows and columns of the input images.
      dropout_keys: (b,) keys for a decoder with dropout, or None.
    """

    taps: dict[str, Array]
    size: tuple[int, int] = struct.field(pytree_node=False)
    dropout_keys: Array | None = None


class Prediction(struct.PyTreeNode):
    """The output of a segmenter, at the decoder's stride or at full size.

    Attributes:
      logits: (b,h,w,c) float32.
      embedding: (b,h,w,d) pixel embedding, or None.
      auxiliary: (b,h,w,c) logits of the auxiliary classifier, or None.
      decoder: (b,h,w,d) the decoder's last feature map, the tap named "decoder".
    """

    logits: Array
    embedding: Array | None = None
    auxiliary: Array | None = None
    decoder: Array | None = None


class Network(struct.PyTreeNode):
    """A segmenter with its variables, through which methods call networks.

    Train-mode calls update the running statistics, so every call returns the network
    to use next; the statistics are updated in the order of the calls.
    """

    module: Any = struct.field(pytree_node=False)
    params: PyTree
    batch_stats: PyTree
    train: bool = struct.field(pytree_node=False, default=False)

    def _apply(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, "Network"]:
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        method_fn = getattr(self.module, method)
        if not self.train:
            out = self.module.apply(variables, *args, method=method_fn, **kwargs)
            return out, self
        out, updated = self.module.apply(
            variables,
            *args,
            train=True,
            method=method_fn,
            mutable=["batch_stats"],
            **kwargs,
        )
        # A partial pass updates part of the statistics; Flax returns all of them.
        # A network without batch norm has none.
        return out, self.replace(batch_stats=updated.get("batch_stats", {}))

    def encode(
        self,
        images: Array,
        until: str | None = None,
        dropout_keys: Array | None = None,
        passes: int = 1,
    ):
        """(b,h,w,c) normalized images, (b,) dropout keys -> (Features, Network).

        With `passes`, equal parts of the batch are encoded as if one after the other.
        """
        drawn = {} if dropout_keys is None else {"dropout_keys": dropout_keys}
        return self._apply("encode", images, until=until, passes=passes, **drawn)

    def decode(
        self,
        features: Features,
        decoder_dropout: Mapping[str, Array] | None = None,
        passes: int = 1,
    ):
        """Features -> (Prediction at the decoder's stride, Network).

        `decoder_dropout`: name of a map of the decoder -> (b,1,1,d) multiplier.
        `passes` as of `encode`.
        """
        return self._apply(
            "decode", features, decoder_dropout=decoder_dropout, passes=passes
        )

    def tap_map(self, images: Array, tap: str) -> Array:
        """The map of one tap, without updating any statistics: (b,h,w,d)."""
        if tap != "decoder":
            features, _ = self.encode(images, until=tap)
            return features.taps[tap]
        features, network = self.encode(images)
        prediction, _ = network.decode(features)
        return prediction.decoder

    def frozen(self) -> "Network":
        """The same network as a constant in evaluation mode: a teacher."""
        return self.replace(
            params=jax.lax.stop_gradient(self.params),
            batch_stats=jax.lax.stop_gradient(self.batch_stats),
            train=False,
        )


class Region(struct.PyTreeNode):
    """The pixels that a loss term counts, as far as known before any prediction.

    `valid` is the method's choice and `real` a fact of images and labels: a method
    whose published code counts padding has pixels that are valid and not real.

    Attributes:
      valid: (b,h,w) bool, the pixels that the base method's loss counts in its divisor.
      real: (b,h,w) bool, the pixels that show an image and no padding; for the
        supervised term, those of them with a label. The plug-in uses only these.
    """

    valid: Array
    real: Array


class Supervised(struct.PyTreeNode):
    """The labeled part of a step.

    Attributes:
      logits: (b,h,w,c) full size.
      taps: tap name -> (b,h,w,d).
      label: (b,h,w) integer, after any pasting.
      region: the pixels that count.
      auxiliary: (b,h,w,c) logits of the auxiliary classifier, or None.
      name: the term's name in the metrics; begins with "supervised".
      student_name: the student that predicted it.
    """

    logits: Array
    taps: dict[str, Array]
    label: Array
    region: Region
    auxiliary: Array | None = None
    name: str = struct.field(pytree_node=False, default="supervised")
    student_name: str = struct.field(pytree_node=False, default="student")


class View(struct.PyTreeNode):
    """A student's prediction with the target that supervises it.

    Attributes:
      logits: (b,h,w,c) student logits at full size.
      taps: tap name -> (b,h,w,d) of the same pass.
      image: (b,h,w,c) normalized weak image, mixed like the view.
      target: (b,h,w) integer pseudo-labels.
      weight: (b,h,w) weight of each pixel's loss; 0 where its confidence is too low.
      region: the pixels that count. The term is divided by the number of
        `region.valid` pixels in the whole batch unless `normalizer` is given.
      teacher: the frozen network on which a plug-in evaluates `image`.
      truth: (b,h,w) bool, pixels whose target is ground truth, or None.
      normalizer: this device's part of another divisor, such as the number of groups
        or one that depends on predictions.
      name: the term's name in the metrics.
      loss: one of `VIEW_LOSSES`.
      coefficient: the method's own weight of the term, to be multiplied by alpha.
      unlabeled: whether the images are unlabeled.
      student_name: the student that predicted the view.
      teacher_name: the student whose weights, or averaged weights, `teacher` has.
    """

    logits: Array
    taps: dict[str, Array]
    image: Array
    target: Array
    weight: Array
    region: Region
    teacher: Network
    truth: Array | None = None
    normalizer: Array | None = None
    name: str = struct.field(pytree_node=False, default="unlabeled")
    loss: ViewLoss = struct.field(pytree_node=False, default="ce")
    coefficient: float = struct.field(pytree_node=False, default=1.0)
    unlabeled: bool = struct.field(pytree_node=False, default=True)
    student_name: str = struct.field(pytree_node=False, default="student")
    teacher_name: str = struct.field(pytree_node=False, default="student")


@dataclasses.dataclass(frozen=True)
class Streams:
    """The crops that a method needs from the data pipeline.

    Attributes:
      unlabeled: whether there is an unlabeled stream.
      one_per_group: True for one unlabeled image per group, False for one per labeled
        image.
      partner: crops to mix with the unlabeled ones. "none"; "same", a second crop of
        each unlabeled image; "other", unlabeled images in a separate order;
        "requested", images that the method requests during the run.
      source_scales: range of scales of copy-paste sources, or None for no sources.
      order: how an epoch is filled from the labeled list, see `data.sampling`.
      geometry: how crops are drawn; a key of `GEOMETRIES` in
        `data.geometry.registry`.
      fill: color of the padding, a key of `data.geometry.cropping.FILLS`.
    """

    unlabeled: bool = True
    one_per_group: bool = False
    partner: Literal["none", "same", "other", "requested"] = "none"
    source_scales: tuple[float, float] | None = None
    order: Literal["tiled", "drawn", "restarted"] = "tiled"
    geometry: str = "unimatch"
    fill: Literal["black", "mean", "rounded_mean"] = "black"

    def sizes(self, batch_size: int, group_size: int) -> dict[str, int]:
        """Returns the number of crops per step, by field of `Batch`."""
        unlabeled = batch_size // group_size if self.one_per_group else batch_size
        sizes = {"labeled": batch_size}
        if self.unlabeled:
            sizes["unlabeled"] = unlabeled
        if self.partner != "none":
            sizes["partner"] = unlabeled
        if self.source_scales is not None:
            sizes["source"] = batch_size
        return sizes

    def images(self, batch_size: int, group_size: int) -> int:
        """Returns how many images a step counts for images/s.

        A second crop of the same image and copy-paste sources do not count.
        """
        sizes = self.sizes(batch_size, group_size)
        counted = ["labeled", "unlabeled"]
        counted += ["partner"] if self.partner in ("other", "requested") else []
        return sum(sizes.get(name, 0) for name in counted)


class Term(struct.PyTreeNode):
    """An additional loss term of a method: a mean over devices and micro-batches.

    Attributes:
      total: () this device's sum, with its gradient.
      count: () how many values were summed.
      weight: factor in the objective; the metrics show the mean without it.
    """

    total: Array
    count: Array
    weight: float = struct.field(pytree_node=False, default=1.0)


class Outputs(struct.PyTreeNode):
    """The result of `Method.views`.

    Attributes:
      supervised: the labeled part of every student.
      views: the views with their targets, empty for a supervised method.
      students: the networks after the passes, with their updated statistics.
      state: the method's own state after this micro-batch.
      metrics: name -> (sum, count) of this device, averaged over devices.
      extra: name -> additional loss term.
    """

    supervised: tuple[Supervised, ...]
    views: tuple[View, ...]
    students: dict[str, Network]
    state: PyTree
    metrics: dict[str, tuple[Array, Array]] = struct.field(default_factory=dict)
    extra: dict[str, Term] = struct.field(default_factory=dict)
