"""Evaluation protocols: how a network's scores of a full-size image are computed.

    whole            the whole image
    slide_unimatch   windows truncated at the border, softmax averaged (also AugSeg)
    slide_u2pl       windows shifted back at the border, logits averaged
    slide_ael        the same windows, softmax averaged
    center_crop      a center crop; padding has label 0 (U2PL, AEL)
    volume           slices resized to the crop's size and back, scored by volume (ACDC)

Optionally, an image is also evaluated at other scales and flipped. The scores of each
view are resized to the image's size, converted to probabilities and averaged. Resizing
is bilinear with half-pixel centers, without antialiasing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mpmc_jax.evaluation import windows
from mpmc_jax.evaluation.bounded_jit import bounded_jit
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.types import Array

# A network: (b,h,w,c) normalized images -> logits (b,h,w,C).
NetworkFn = Callable[[Array], Array]

_PADDING_LABEL = 0
# The smallest side of the windows in which `whole` predicts large images.
_LARGE_WINDOW = 512


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """The protocol for whole images; subclasses override parts of it.

    Attributes:
      size: side of a window, of the center crop, or of resized slices.
      scales: factors of the image's sides.
      flip: whether each view is also evaluated flipped horizontally.
    """

    name: ClassVar[str] = "whole"
    # The metric that selects the best checkpoint; whether slices are scored as volumes.
    metric: ClassVar[str] = "miou"
    by_volume: ClassVar[bool] = False
    # Whether `scores_of_view` returns probabilities instead of logits.
    probabilities: ClassVar[bool] = False
    # Whether images are scored whole, in one pass. Only then they may be padded to
    # multiples of `pad_to`, so that fewer sizes are compiled.
    whole_images: ClassVar[bool] = True

    size: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError if a setting is out of range."""
        if self.size < 1:
            raise ValueError(f"the size of windows is {self.size}; set data.crop")
        if not self.scales or not all(0 < each < math.inf for each in self.scales):
            raise ValueError(f"eval.scales={self.scales}: give finite factors above 0")

    def check(self, volumes: Sequence[str]) -> None:
        """Checks the volumes of which the images are slices, "" for none.

        Raises:
          ValueError: the protocol needs volumes, and an image belongs to none.
        """
        if self.by_volume and "" in volumes:
            raise ValueError(
                f"eval.protocol={self.name!r}, but the data set has no volumes; use "
                "'whole'"
            )

    def canvas(self, size: tuple[int, int], pad_to: int) -> tuple[int, int]:
        """Rows and columns of the array in which an image of this size is stored."""
        if pad_to == 0 or not self.whole_images:
            return size
        rows, columns = (-(-side // pad_to) * pad_to for side in size)
        return rows, columns

    def on_canvas(
        self, image: np.ndarray, label: np.ndarray, pixels: PixelFormat
    ) -> tuple[np.ndarray, np.ndarray]:
        """The image and label to put into the upper left corner of the canvas."""
        del pixels
        return image, label

    def for_prediction(self) -> "EvalProtocol":
        """The protocol that predicts every pixel of an image."""
        return self

    def for_large_images(self) -> "Slide | None":
        """The windows in which large images are predicted; None if they need none.

        Softmax is averaged, in windows of the crop's size but at least 512 pixels.
        """
        return SlideAEL(max(self.size, _LARGE_WINDOW), self.scales, self.flip)

    def scores_of_view(self, network: NetworkFn, images: Array) -> Array:
        """The scores of images at one scale and flip: (b,h,w,c) -> (b,h,w,C)."""
        return network(images)

    def scores(self, network: NetworkFn, images: Array) -> Array:
        """The scores of the images, averaged over views: (b,h,w,c) -> (b,h,w,C)."""
        if self.scales == (1.0,) and not self.flip:
            return self.scores_of_view(network, images)
        size = images.shape[1:3]
        total = None
        for scale in self.scales:
            scaled = tuple(max(round(side * scale), 1) for side in size)
            view = resize(images, size=scaled)
            for mirrored in (False, True)[: 1 + self.flip]:
                seen = mirror(view) if mirrored else view
                scores = self.scores_of_view(network, seen)
                scores = resize(mirror(scores) if mirrored else scores, size=size)
                scores = scores if self.probabilities else _softmax(scores)
                total = scores if total is None else _sum(total, scores)
        assert total is not None  # There is a scale.
        return _divide(total, len(self.scales) * (1 + self.flip))

    def to_probabilities(self, scores: Array) -> Array:
        """Converts what `scores` returned to probabilities."""
        return scores if self.gives_probabilities else _softmax(scores)

    @property
    def gives_probabilities(self) -> bool:
        """Whether `scores` returns probabilities instead of logits."""
        return self.probabilities or self.scales != (1.0,) or self.flip

    def probed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of `probed` images, for images of a size."""
        return size

    def probed(self, images: Array, labels: Array) -> tuple[Array, Array]:
        """The images and labels on which the patch classifier is evaluated."""
        return images, labels


class Slide(EvalProtocol):
    """Sliding-window evaluation: scores are averaged where windows overlap."""

    whole_images = False

    def spans(self, side: int) -> list[windows.Span]:
        """The start and length of the windows along one axis."""
        return windows.shifted_spans(side, self.size)

    def for_large_images(self) -> "Slide | None":
        return self

    def scores_of_cut_windows(self, network: NetworkFn, images: Array) -> Array:
        """The scores of windows that were cut out of a large image (`bands`).

        Each is seen at all scales and flips by itself; `scores` resizes and flips the
        whole image before it is cut.
        """
        whole = EvalProtocol(self.size, self.scales, self.flip)
        scores = whole.scores(network, images)
        return whole.to_probabilities(scores) if self.gives_probabilities else scores

    def scores_of_view(self, network: NetworkFn, images: Array) -> Array:
        """The scores of the windows of images, averaged where windows overlap."""
        _, rows, columns, _ = images.shape
        total, count = None, np.zeros((rows, columns), np.float32)
        places = windows.windows(self.spans(rows), self.spans(columns))
        for top, left, height, width in places:
            corner = (top, left)
            scores = network(_cut(images, corner, size=(height, width)))
            scores = _softmax(scores) if self.probabilities else scores
            if total is None:
                total = _begin(scores, corner, size=(rows, columns))
            else:
                total = _add(total, scores, corner)
            count[top : top + height, left : left + width] += 1
        assert total is not None  # There is a window.
        return _divide(total, count[None, :, :, None])


class SlideUniMatch(Slide):
    """UniMatch's and AugSeg's sliding windows.

    The originals sum instead of averaging; the argmax is the same.
    """

    name = "slide_unimatch"
    probabilities = True

    def spans(self, side: int) -> list[windows.Span]:
        return windows.truncated_spans(side, self.size)


class SlideU2PL(Slide):
    """U2PL's sliding windows, whose logits are averaged."""

    name = "slide_u2pl"


class SlideAEL(Slide):
    """AEL's sliding windows, whose softmax is averaged."""

    name = "slide_ael"
    probabilities = True


class CenterCrop(EvalProtocol):
    """A center crop, U2PL's and AEL's validation during training."""

    name = "center_crop"
    whole_images = False

    def canvas(self, size: tuple[int, int], pad_to: int) -> tuple[int, int]:
        return self.size, self.size

    def on_canvas(
        self, image: np.ndarray, label: np.ndarray, pixels: PixelFormat
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crops the center; pads with the mean, which is 0 in normalized images."""
        shape = (self.size, self.size)
        canvas = np.empty((*shape, image.shape[2]), image.dtype)
        canvas[:] = pixels.stored(np.array(pixels.mean))
        labels = np.full(shape, _PADDING_LABEL, label.dtype)
        (rows_in, rows), (columns_in, columns) = map(self._middle, label.shape)
        canvas[rows, columns] = image[rows_in, columns_in]
        labels[rows, columns] = label[rows_in, columns_in]
        return canvas, labels

    def _middle(self, side: int) -> tuple[slice, slice]:
        """Along one axis, the slices of the image and of the canvas."""
        length = min(side, self.size)
        start, at = (side - length) // 2, (self.size - length) // 2
        return slice(start, start + length), slice(at, at + length)

    def for_prediction(self) -> EvalProtocol:
        return EvalProtocol(self.size, self.scales, self.flip)


class PerVolume(EvalProtocol):
    """Slices resized to the size of training crops; metrics are of whole volumes.

    Source: UniMatch, more-scenarios/medical/unimatch.py.
    """

    name = "volume"
    whole_images = False
    metric = "dice"
    by_volume = True

    def for_large_images(self) -> Slide | None:
        return None  # The network sees slices of one size.

    def scores_of_view(self, network: NetworkFn, images: Array) -> Array:
        """The scores of slices resized to the training crops' size, and back."""
        size = images.shape[1:3]
        square = (self.size, self.size)
        return resize(network(resize(images, size=square)), size=size)

    def probed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size

    def probed(self, images: Array, labels: Array) -> tuple[Array, Array]:
        rows, columns = labels.shape[1:3]
        size = self.probed_size((rows, columns))
        return resize(images, size=size), resize_nearest(labels, size=size)


PROTOCOLS: dict[str, type[EvalProtocol]] = {
    kind.name: kind
    for kind in (
        EvalProtocol,
        SlideUniMatch,
        SlideU2PL,
        SlideAEL,
        CenterCrop,
        PerVolume,
    )
}


def build_protocol(
    name: str, size: int, scales: tuple[float, ...] = (1.0,), flip: bool = False
) -> EvalProtocol:
    """Builds the protocol `name`.

    Raises:
      ValueError: unknown name, listing the valid ones, or a setting is out of range.
    """
    if name not in PROTOCOLS:
        raise ValueError(
            f"eval.protocol={name!r} is unknown; valid: {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[name](size, tuple(map(float, scales)), flip)


@bounded_jit()
def resize(x_bhwc: Array, size: tuple[int, int]) -> Array:
    """Resizes bilinearly with half-pixel centers, without antialiasing."""
    if x_bhwc.shape[1:3] == tuple(size):
        return x_bhwc
    shape = (x_bhwc.shape[0], *size, x_bhwc.shape[3])
    return jax.image.resize(
        x_bhwc,
        shape,
        "linear",
        antialias=False,
        precision=jax.lax.Precision.HIGHEST,
    )


@bounded_jit()
def resize_nearest(x_bhw: Array, size: tuple[int, int]) -> Array:
    """Resizes class maps by the nearest pixel: (b,h,w) -> (b,*size)."""
    return jax.image.resize(x_bhw, (x_bhw.shape[0], *size), "nearest")


@bounded_jit()
def mirror(x_bhwc: Array) -> Array:
    """Flips images horizontally."""
    return x_bhwc[:, :, ::-1]


@bounded_jit()
def _softmax(x_bhwc: Array) -> Array:
    return jax.nn.softmax(x_bhwc)


@bounded_jit()
def _sum(x_bhwc: Array, y_bhwc: Array) -> Array:
    return x_bhwc + y_bhwc


@bounded_jit()
def _divide(x_bhwc: Array, divisor: Array | int) -> Array:
    return x_bhwc / divisor


@bounded_jit()
def _cut(x_bhwc: Array, corner: Array, *, size: tuple[int, int]) -> Array:
    shape = (x_bhwc.shape[0], *size, x_bhwc.shape[3])
    return jax.lax.dynamic_slice(x_bhwc, (0, *corner, 0), shape)


@bounded_jit()
def _begin(part: Array, corner: Array, *, size: tuple[int, int]) -> Array:
    """Scores of a whole image, (b,*size,C), with only the first window's added."""
    total = jnp.zeros((part.shape[0], *size, part.shape[3]), part.dtype)
    return jax.lax.dynamic_update_slice(total, part, (0, *corner, 0))


@bounded_jit(donate_argnums=0)
def _add(total: Array, part: Array, corner: Array) -> Array:
    """Adds a window's scores in place, so that an image needs one array of scores."""
    start = (0, *corner, 0)
    there = jax.lax.dynamic_slice(total, start, part.shape)
    return jax.lax.dynamic_update_slice(total, there + part, start)
