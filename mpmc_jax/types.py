"""The data that passes between the parts, and the legend of shape suffixes.

Array names carry their axes in lower case:

    b examples on one device      h, w rows and columns of the array at hand
    c image channels or classes   d feature channels      r patches (h*w of a tap)

So `logits_bhwc` are class scores and `label_bhw` a label map. Everything here is
plain data: no part of the training loop, no network and no file is needed to make it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
from flax import struct

Array = jax.Array
PyTree = Any

IGNORE_LABEL = 255

# What a view's loss may be, see `training.objective.view_loss`.
ViewLoss = Literal["ce", "balanced_ce", "dice"]
VIEW_LOSSES: tuple[ViewLoss, ...] = get_args(ViewLoss)


class Crops(struct.PyTreeNode):
    """The crops of one stream in a batch, with random geometry but no color changes.

    Attributes:
      image: (b,h,w,c) uint8; with `data.resident` crop plans until they are placed.
      extent: (b,4) int32, the rectangle of real pixels (top, left, bottom, right);
        everything outside is padding.
      index: (b,) int32, the example's position in its id list.
      record: (b,) int32, the example's position in the global batch. Random keys
        derive from it, never from a device number.
      label: (b,h,w) uint8 with 255 for void, or None for unlabeled crops.
    """

    image: Array
    extent: Array
    index: Array
    record: Array
    label: Array | None = None


class Batch(struct.PyTreeNode):
    """The crops of one optimizer step.

    Attributes:
      labeled: crops with labels.
      unlabeled: crops without labels, or None for a supervised method.
      partner: a crop to mix with each unlabeled one, or None. It is of the same image
        (UniMatch), or of one that the method requested some steps before (AEL).
      source: labeled crops to copy objects from (AEL), or None; a crop is all void if
        nothing is copied.
    """

    labeled: Crops
    unlabeled: Crops | None = None
    partner: Crops | None = None
    source: Crops | None = None


class Features(struct.PyTreeNode):
    """What an encoder hands to a decoder.

    Attributes:
      taps: name of the layer -> (b,h,w,d) map.
      size: rows and columns of the input images.
    """

    taps: dict[str, Array]
    size: tuple[int, int] = struct.field(pytree_node=False)


class Prediction(struct.PyTreeNode):
    """What a segmenter says, at the decoder's stride or at full size.

    Attributes:
      logits: (b,h,w,c) float32.
      embedding: (b,h,w,d) pixel embedding, or None.
      auxiliary: (b,h,w,c) logits of the auxiliary head, or None.
      decoder: (b,h,w,d) the decoder's last feature map, the tap named "decoder".
    """

    logits: Array
    embedding: Array | None = None
    auxiliary: Array | None = None
    decoder: Array | None = None


class Network(struct.PyTreeNode):
    """A segmenter with its variables: the handle through which methods see networks.

    Train-mode calls move the running statistics, so every call returns the handle
    to use next; the order of calls is the order of updates.
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
        out, moved = self.module.apply(
            variables,
            *args,
            train=True,
            method=method_fn,
            mutable=["batch_stats"],
            **kwargs,
        )
        # A partial pass touches part of the statistics; Flax returns all of them.
        # A network without batch norm has none.
        return out, self.replace(batch_stats=moved.get("batch_stats", {}))

    def encode(
        self, images: Array, until: str | None = None, dropout_keys: Array | None = None
    ):
        """(b,h,w,c) normalized images, (b,) keys of dropout -> (Features, Network)."""
        drawn = {} if dropout_keys is None else {"dropout_keys": dropout_keys}
        return self._apply("encode", images, until=until, **drawn)

    def decode(self, features: Features, dropout: Mapping[str, Array] | None = None):
        """Features -> (Prediction at the decoder's stride, Network).

        `dropout` multiplies maps of the decoder, by name: (b,1,1,d) each.
        """
        return self._apply("decode", features, dropout=dropout)

    def upsample(self, logits: Array, size: tuple[int, int]) -> Array:
        """Logits at the decoder's stride -> (b,*size,c), as this network does it."""
        return self.module.upsample(logits, size)

    def taps(self, images: Array, tap: str) -> Array:
        """The map of one tap, without moving any statistic: (b,h,w,d)."""
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
    """Where a loss term counts; known before any prediction.

    Attributes:
      valid: (b,h,w) bool, the pixels by whose number the base method divides.
      real: (b,h,w) bool, the pixels that come from an image (and, for the
        supervised term, carry a label). The plug-in looks at these alone.
    """

    valid: Array
    real: Array


class Supervised(struct.PyTreeNode):
    """The labeled part of a step.

    Attributes:
      logits: (b,h,w,c) full size.
      taps: tap name -> (b,h,w,d).
      label: (b,h,w) integer, after any pasting.
      region: where it counts.
      auxiliary: (b,h,w,c) logits of the auxiliary head, or None.
      name: names the term in the metrics; begins with "supervised".
    """

    logits: Array
    taps: dict[str, Array]
    label: Array
    region: Region
    auxiliary: Array | None = None
    name: str = struct.field(pytree_node=False, default="supervised")


class View(struct.PyTreeNode):
    """One way in which a target supervises a prediction.

    Attributes:
      logits: (b,h,w,c) student logits at full size.
      taps: tap name -> (b,h,w,d) of the same pass.
      image: (b,h,w,c) normalized weak image, mixed as the view was; what a plug-in
        shows to its teacher.
      target: (b,h,w) integer pseudo-labels.
      weight: (b,h,w) weight of each pixel's loss; 0 where its confidence is too low.
      region: where it counts. The term divides by the number of `region.valid`
        pixels of the whole batch unless `normalizer` is given.
      teacher: the network that made the target, frozen.
      truth: (b,h,w) bool, pixels whose target is ground truth, or None.
      normalizer: this device's share of another divisor: one that depends on
        predictions, or a number of groups.
      name: names the term in the metrics.
      loss: one of `VIEW_LOSSES`.
      coefficient: the method's own weight of the term, before alpha.
      unlabeled: False where the images are labeled ones.
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


@dataclasses.dataclass(frozen=True)
class Streams:
    """The crops that a method asks of the data pipeline.

    Attributes:
      unlabeled: whether there is an unlabeled stream.
      one_per_group: whether there is one unlabeled image per group, instead of one per
        labeled image.
      partner: crops to mix with the unlabeled ones. "none"; "same", a second crop of
        each unlabeled image; "other", unlabeled images in an order of their own;
        "requested", images that the method requests during the run.
      source: range of scales of copy-paste sources, or None for no sources.
      order: how the labeled list fills an epoch, see `data.sampling`.
      geometry: how crops are drawn; a key of `GEOMETRIES` in
        `data.geometry.registry`.
      fill: color of the padding, a key of `data.geometry.cropping.FILLS`.
    """

    unlabeled: bool = True
    one_per_group: bool = False
    partner: Literal["none", "same", "other", "requested"] = "none"
    source: tuple[float, float] | None = None
    order: Literal["tiled", "drawn", "restarted"] = "tiled"
    geometry: str = "unimatch"
    fill: Literal["black", "mean", "nearest_mean"] = "black"

    def sizes(self, batch_size: int, group_size: int) -> dict[str, int]:
        """Returns the number of crops per step, by field of `Batch`."""
        unlabeled = batch_size // group_size if self.one_per_group else batch_size
        sizes = {"labeled": batch_size}
        if self.unlabeled:
            sizes["unlabeled"] = unlabeled
        if self.partner != "none":
            sizes["partner"] = unlabeled
        if self.source is not None:
            sizes["source"] = batch_size
        return sizes

    def images(self, batch_size: int, group_size: int) -> int:
        """Returns how many images are read per step."""
        sizes = self.sizes(batch_size, group_size)
        read = ["labeled", "unlabeled"]
        read += ["partner"] if self.partner in ("other", "requested") else []
        return sum(sizes.get(name, 0) for name in read)


class Term(struct.PyTreeNode):
    """A loss term of a method's own: a mean over devices and micro-batches.

    Attributes:
      total: () this device's sum, with its gradient.
      count: () what it was summed over.
      weight: factor in the objective; the metrics show the mean without it.
    """

    total: Array
    count: Array
    weight: float = struct.field(pytree_node=False, default=1.0)


class Outputs(struct.PyTreeNode):
    """What `Method.views` returns.

    Attributes:
      supervised: the labeled part of every student.
      views: the unlabeled parts, empty for a supervised method.
      students: the networks after the passes, with their moved statistics.
      state: the method's own state after the step.
      metrics: name -> (sum, count) of this device, averaged over devices.
      extra: name -> loss term of the method's own.
    """

    supervised: tuple[Supervised, ...]
    views: tuple[View, ...]
    students: dict[str, Network]
    state: PyTree
    metrics: dict[str, tuple[Array, Array]] = struct.field(default_factory=dict)
    extra: dict[str, Term] = struct.field(default_factory=dict)
