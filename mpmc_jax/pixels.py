"""The pixel format of a data set: how images are stored and normalized."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How a data set stores its images, and how they become a network's input.

    Per channel, unit = (value - low) / (high - low) and input = (unit - mean) / std.
    A byte is always unit * 255, also in crops of deeper images that were converted.

    Attributes:
      channels: number of channels.
      mean, std: mean and deviation of the unit values.
      dtype: type of the stored images: "uint8", "uint16" or "float32".
      low, high: stored values that become 0 and 1.
      nodata: stored values that stand for missing data; "nan" for all values that are
        not finite.
      nodata_fill: stored value that replaces missing ones, per channel: the mean of the
        training images.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "uint8"
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    nodata: tuple[float | str, ...] = ()
    nodata_fill: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one number per channel, or one for all."""
        for field in ("mean", "std", "low", "high", "nodata_fill"):
            values = tuple(map(float, getattr(self, field)))
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{field}={values}: give one number for each of {self.channels} "
                    "channels"
                )
            values = values * self.channels if len(values) == 1 else values
            object.__setattr__(self, field, values)
        object.__setattr__(self, "nodata", tuple(self.nodata))

    def missing(self, stored: np.ndarray) -> np.ndarray | None:
        """Returns which stored values (...,c) are missing; None without `nodata`."""
        if not self.nodata:
            return None
        missing = np.zeros(stored.shape, bool)
        for value in self.nodata:
            if value == "nan":
                missing |= ~np.isfinite(stored)
            else:
                # Images in single precision are compared in single precision.
                with np.errstate(over="ignore"):
                    missing |= stored == float(value)
        return missing

    def fill(self, stored: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Returns stored values with the missing ones replaced by `nodata_fill`."""
        fill = np.array(self.nodata_fill)
        if self.dtype != "float32":
            fill = np.rint(fill)
        return np.where(missing, fill.astype(stored.dtype), stored)

    def stored(self, unit: np.ndarray) -> np.ndarray:
        """Converts unit values (...,c) to stored ones; integers are rounded."""
        low, high = np.array(self.low), np.array(self.high)
        values = low + unit * (high - low)
        return (values if self.dtype == "float32" else np.rint(values)).astype(
            self.dtype
        )


# Mean and deviation of the unit values of RGB images, as pretrained encoders expect
# them: ImageNet's; or 0.5 each, for augreg's vision transformers.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_MEAN, _STD = NORMALIZATIONS["imagenet"]
# RGB bytes with ImageNet's mean and deviation.
RGB = PixelFormat(3, mean=_MEAN, std=_STD)
GRAY = PixelFormat(1, mean=(0.0,), std=(1.0,))
