"""Mean, deviation and range of a data set's images, accumulated image by image.

Moments are merged by the formula of Chan, Golub and LeVeque ("Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979), to avoid cancellation.
"""

import dataclasses

import numpy as np

from mpmc_jax.pixels import PixelFormat

# Numbers that programs commonly write for missing data.
_SENTINELS = (
    -9999,
    -99999,
    -999,
    -32768,
    -32767,
    -1e20,
    1e20,
    -3.4028235e38,
    9.96921e36,
)
# A value stands for missing data if it is this many times their range away from others.
_FAR = 10.0
# The same for the sentinels above.
_FAR_FOR_SENTINEL = 0.5


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of stored values per channel, without missing values.

    Attributes:
      count: (c,) number of pixels.
      mean: (c,) float64.
      squares: (c,) float64, sum of the squared differences from the mean.
      low, high: (c,2) the two smallest and the two largest distinct values, the most
        extreme first; infinite if there are fewer.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def merge(self, other: "Moments | None") -> "Moments":
        """Returns the moments of the pixels of both; `other` may be None."""
        if other is None:
            return self
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * share,
            squares=self.squares + other.squares + apart**2 * (self.count * share),
            low=_outermost(np.hstack([self.low, other.low])),
            high=-_outermost(-np.hstack([self.high, other.high])),
        )

    def describe(self, pixels: PixelFormat) -> PixelFormat:
        """Returns a pixel format with these moments; bytes keep the range 0 to 255.

        A channel that is constant, or missing everywhere, gets a deviation of 1.
        """
        low, high = np.array(pixels.low), np.array(pixels.high)
        if pixels.dtype != "uint8":
            low = np.where(self.count > 0, self.low[:, 0], 0.0)
            high = np.where(self.count > 0, self.high[:, 0], 1.0)
            high = np.where(high > low, high, low + 1)
        mean = (self.mean - low) / (high - low)
        std = np.sqrt(self.squares / np.maximum(self.count, 1)) / (high - low)
        std = np.where(std > 0, std, 1.0)
        return dataclasses.replace(
            pixels,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            low=tuple(low.tolist()),
            high=tuple(high.tolist()),
            nodata_fill=tuple(self.mean.tolist()),
        )

    def sentinels(self) -> dict[float, list[int]]:
        """Returns values that seem to stand for missing data -> channels, from 1."""
        found: dict[float, list[int]] = {}
        for i in range(len(self.count)):
            (low, next_low), (high, next_high) = self.low[i], self.high[i]
            for value, gap, rest in (
                (low, next_low - low, high - next_low),
                (high, high - next_high, next_high - low),
            ):
                known = any(np.isclose(value, each, rtol=1e-6) for each in _SENTINELS)
                least = _FAR_FOR_SENTINEL if known else _FAR
                # Images of only two values are masks, unless one is a known sentinel.
                if gap > least * rest and np.isfinite(gap) and (rest > 0 or known):
                    found.setdefault(float(value), []).append(i + 1)
        return found


def moments(pixels_hwc: np.ndarray, missing_hwc: np.ndarray | None = None) -> Moments:
    """Returns the moments of one image.

    Args:
      pixels_hwc: the image's values.
      missing_hwc: bool, the values to leave out.
    """
    parts = []
    for i in range(pixels_hwc.shape[-1]):
        values = pixels_hwc[..., i]
        if missing_hwc is not None:
            values = values[~missing_hwc[..., i]]
        parts.append(_of_channel(values.ravel()))
    count, mean, squares, low, high = map(np.array, zip(*parts, strict=True))
    return Moments(count, mean, squares, low, high)


def _of_channel(values: np.ndarray) -> tuple:
    if not values.size:
        return 0, 0.0, 0.0, (np.inf, np.inf), (-np.inf, -np.inf)
    exact = values.astype(np.float64)
    mean = exact.mean()
    low, high = exact.min(), exact.max()
    inner = (np.inf, -np.inf)
    if values.dtype != np.uint8:  # Bytes keep their range.
        inner = (
            exact.min(where=exact > low, initial=np.inf),
            exact.max(where=exact < high, initial=-np.inf),
        )
    squares = ((exact - mean) ** 2).sum()
    return values.size, mean, squares, (low, inner[0]), (high, inner[1])


def _outermost(values: np.ndarray) -> np.ndarray:
    """Returns the two smallest distinct values (c,2) of each row of (c,n)."""
    least = values.min(axis=1, keepdims=True)
    second = values.min(axis=1, keepdims=True, where=values > least, initial=np.inf)
    return np.hstack([least, second])
