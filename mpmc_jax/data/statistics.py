"""Mean, deviation and range of a data set's images, image by image.

Moments of parts are merged as Chan, Golub and LeVeque do ("Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979), so that nothing cancels.
"""

import dataclasses

import numpy as np

from mpmc_jax.pixels import PixelFormat

# Numbers that programs write where there is no measurement.
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
# A value as far from all others as this many times their range stands for none.
_FAR = 10.0
# So does a known sentinel that is as far from them as this.
_FAR_FOR_SENTINEL = 0.5


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of stored values, by channel; missing ones are left out.

    Attributes:
      count: (c,) pixels.
      mean: (c,) float64.
      squares: (c,) float64, sum of the squared differences from the mean.
      low, high: (c,2) the two least and the two greatest distinct values, outermost
        first; infinite where there is none.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def merge(self, other: "Moments | None") -> "Moments":
        """Of the pixels of both, or of these alone."""
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
        """The format with these figures; bytes keep their range of 0 to 255.

        A channel that is one value everywhere gets a deviation of 1, to stay finite;
        so does one in which every value is missing.
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
        """Values that seem to stand for no measurement -> channels, from 1."""
        found: dict[float, list[int]] = {}
        for i in range(len(self.count)):
            (low, next_low), (high, next_high) = self.low[i], self.high[i]
            for value, gap, rest in (
                (low, next_low - low, high - next_low),
                (high, high - next_high, next_high - low),
            ):
                known = any(np.isclose(value, each, rtol=1e-6) for each in _SENTINELS)
                least = _FAR_FOR_SENTINEL if known else _FAR
                # Two values alone are a mask, unless one of them is known.
                if gap > least * rest and np.isfinite(gap) and (rest > 0 or known):
                    found.setdefault(float(value), []).append(i + 1)
        return found


def moments(pixels_hwc: np.ndarray, missing_hwc: np.ndarray | None = None) -> Moments:
    """Of one image, in float64.

    Args:
      pixels_hwc: its values.
      missing_hwc: bool, which of them do not count.
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
    """(c,n) -> (c,2), the least and the next."""
    least = values.min(axis=1, keepdims=True)
    second = values.min(axis=1, keepdims=True, where=values > least, initial=np.inf)
    return np.hstack([least, second])
