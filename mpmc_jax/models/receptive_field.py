"""Computes receptive fields from the layers that a network is built from.

Composing layers (Araujo et al., "Computing receptive fields of convolutional neural
networks", Distill 2019): a layer of kernel k and dilation e at jump j, the distance
in pixels between its inputs, widens the field by e(k-1)j; its padding shifts the first
position by j for every row, and its stride multiplies j. Attention sees all of an image
and does not count: a token's field is that of its patch.
"""

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from mpmc_jax.models.layers import ConvSpec


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Bilinear upsampling as a layer that reads the neighbors within +-1 position."""

    factor: int
    kernel: int = 3
    dilation: int = 1
    padding: int = 1

    @property
    def stride(self) -> Fraction:
        """Below one: the jump shrinks."""
        return Fraction(1, self.factor)


# A layer of which kernel, stride, padding and dilation are known.
Layer = ConvSpec | Interpolation


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """The part of the image that one position of a map depends on.

    Position i covers the rows i*stride - padding to i*stride - padding + size - 1;
    rows outside the image are zero padding. A stride that is no whole number, as on
    DPT's maps of DINOv2's patches of 14 pixels, is rounded down after the product, and
    the square is large enough for that.

    Attributes:
      size: side of the square, in pixels.
      stride: pixels between neighboring positions.
      padding: pixels by which the first position's square leaves the image.
    """

    size: int
    stride: int | Fraction
    padding: int

    def starts(self, count: int) -> list[int]:
        """Lists the first row of positions 0..count-1, from the first one's."""
        return [math.floor(i * self.stride) for i in range(count)]

    def spans(self, side: int, count: int) -> np.ndarray:
        """Returns the pixels of positions along an axis: (count,2) first, after last.

        They are cut off at the border of the image.
        """
        start = np.array(self.starts(count)) - self.padding
        return np.clip(np.stack([start, start + self.size], axis=1), 0, side)


def compose(layers: Iterable[Layer]) -> ReceptiveField:
    """Computes the field of a chain of layers, from the image on."""
    size, jump, padding = Fraction(1), Fraction(1), Fraction(0)
    for layer in layers:
        size += layer.dilation * (layer.kernel - 1) * jump
        padding += layer.padding * jump
        jump *= layer.stride
    if jump.denominator == 1:
        return ReceptiveField(int(size), int(jump), int(padding))
    # Rounded outwards: the first row by less than two pixels, so the last by one.
    return ReceptiveField(math.ceil(size) + 1, jump, math.ceil(padding))


def stride_of(layers: Iterable[Layer]) -> int | Fraction:
    """Returns the pixels between neighboring positions at the end of a chain."""
    return compose(layers).stride
