"""Mean, deviation and range of a data set's images, image by image.

Moments of parts are merged as Chan, Golub and LeVeque do ("Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979), so that nothing cancels.
"""

import dataclasses

import numpy as np

from mpmc_jax.pixels import PixelFormat


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of stored values, by channel.

    Attributes:
      count: pixels.
      mean: (c,) float64.
      squares: (c,) float64, sum of the squared differences from the mean.
      low, high: (c,) the least and the greatest value.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def merge(self, other: "Moments") -> "Moments":
        """Of the pixels of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * (other.count / count),
            squares=self.squares
            + other.squares
            + apart**2 * (self.count * other.count / count),
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
        )

    def describe(self, pixels: PixelFormat) -> PixelFormat:
        """The format with these figures; bytes keep their range of 0 to 255.

        A channel that is one value everywhere gets a deviation of 1, to stay finite.
        """
        low, high = np.array(pixels.low), np.array(pixels.high)
        if pixels.dtype != "uint8":
            low, high = self.low.astype(float), self.high.astype(float)
            high = np.where(high > low, high, low + 1)
        mean = (self.mean - low) / (high - low)
        std = np.sqrt(self.squares / self.count) / (high - low)
        std = np.where(std > 0, std, 1.0)
        return dataclasses.replace(
            pixels,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
        )


def moments(pixels_hwc: np.ndarray) -> Moments:
    """Of one image, in float64."""
    values = pixels_hwc.reshape(-1, pixels_hwc.shape[-1]).astype(np.float64)
    mean = values.mean(axis=0)
    return Moments(
        count=len(values),
        mean=mean,
        squares=((values - mean) ** 2).sum(axis=0),
        low=values.min(axis=0),
        high=values.max(axis=0),
    )
