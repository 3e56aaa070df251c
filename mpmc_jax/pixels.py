"""How images are stored and normalized: plain data that every part reads."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """How a data set stores its images, and how they become a network's input.

    By channel, unit = (value - low) / (high - low) and input = (unit - mean) / std.
    Bytes are always unit * 255, crops of deeper images that came as bytes included.

    Attributes:
      channels: of an image.
      mean, std: of the unit values.
      dtype: of the stored images: "uint8", "uint16" or "float32".
      low, high: stored values that become 0 and 1.
      nodata: stored values that stand for none; "nan" for all that are not finite.
      nodata_fill: stored value that missing ones get, by channel: the mean of the
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
        """Raises ValueError unless there is one figure a channel."""
        for field in ("mean", "std", "low", "high", "nodata_fill"):
            values = tuple(map(float, getattr(self, field)))
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{field}={values}: {self.channels} channels need as many figures"
                )
            values = values * self.channels if len(values) == 1 else values
            object.__setattr__(self, field, values)
        object.__setattr__(self, "nodata", tuple(self.nodata))

    def missing(self, stored: np.ndarray) -> np.ndarray | None:
        """Which of the stored values (...,c) stand for none; None without `nodata`."""
        if not self.nodata:
            return None
        missing = np.zeros(stored.shape, bool)
        for value in self.nodata:
            if value == "nan":
                missing |= ~np.isfinite(stored)
            else:
                # Compared in single precision where images are.
                with np.errstate(over="ignore"):
                    missing |= stored == float(value)
        return missing

    def fill(self, stored: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """Stored values with those that are `missing` replaced by `nodata_fill`."""
        fill = np.array(self.nodata_fill)
        if self.dtype != "float32":
            fill = np.rint(fill)
        return np.where(missing, fill.astype(stored.dtype), stored)

    def stored(self, unit: np.ndarray) -> np.ndarray:
        """Unit values (...,c) -> stored ones, rounded where these are whole numbers."""
        low, high = np.array(self.low), np.array(self.high)
        values = low + unit * (high - low)
        return (values if self.dtype == "float32" else np.rint(values)).astype(
            self.dtype
        )


# Bytes as pretrained encoders know them: the mean and deviation are ImageNet's.
RGB = PixelFormat(3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
GRAY = PixelFormat(1, mean=(0.0,), std=(1.0,))
