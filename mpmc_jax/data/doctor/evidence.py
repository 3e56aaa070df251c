"""What is kept of an image and its mask to judge the labels, when both are read."""

import dataclasses
import hashlib

import numpy as np
import scipy.fft
from PIL import Image

from mpmc_jax.data.doctor import edges
from mpmc_jax.types import IGNORE_LABEL

# The perceptual hash has 16 x 16 bits, of an image of 64 x 64 pixels.
_HASHED, _FREQUENCIES = 64, 16


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Facts of one image, and of its mask if it has one that fits it.

    Attributes:
      image_digest: digest of the image's pixels.
      picture: (256,) bool, the perceptual hash, see `picture_hash`.
      blank: whether all pixels of the image are equal.
      label_digest: digest of the labels; "" without a mask.
      counts: (256,) pixels per label.
      isolated: share of the pixels whose four neighbors have other labels than they.
      blended: share of the borders between classes of numbers further apart than 1 at
        which there is a class of a number between the two, one or two pixels wide.
      rim: most frequent label on the image's border.
      fit: how the mask fits the image.
    """

    image_digest: str
    picture: np.ndarray
    blank: bool
    label_digest: str = ""
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(256, int))
    isolated: float = 0.0
    blended: float = 0.0
    rim: int = IGNORE_LABEL
    fit: edges.Fit | None = None


# Values may stand for missing pixels without being declared so.
@np.errstate(over="ignore", invalid="ignore")
def examine(
    image_hwc: np.ndarray, label_hw: np.ndarray | None, image_digest: str
) -> Evidence:
    """Measures an image and its mask.

    Args:
      image_hwc: stored values.
      label_hw: labels, 255 for void; None without a mask, or if it has another size.
      image_digest: digest of the image's pixels.
    """
    blank = bool((image_hwc == image_hwc[:1, :1]).all())
    picture = picture_hash(image_hwc)
    if label_hw is None or label_hw.shape != image_hwc.shape[:2]:
        return Evidence(image_digest, picture, blank)
    part_hw = label_hw[edges.center(label_hw.shape)]
    rim = np.concatenate([label_hw[0], label_hw[-1], label_hw[:, 0], label_hw[:, -1]])
    return Evidence(
        image_digest,
        picture,
        blank,
        label_digest=hashlib.sha256(label_hw.tobytes()).hexdigest(),
        counts=np.bincount(label_hw.ravel(), minlength=256),
        isolated=_isolated(part_hw),
        blended=_blended(part_hw),
        rim=int(np.bincount(rim).argmax()),
        fit=edges.fit(image_hwc, label_hw),
    )


def picture_hash(image_hwc: np.ndarray) -> np.ndarray:
    """Returns the perceptual hash of an image: the signs of its low frequencies.

    It changes little if the image is resized, compressed or made brighter.
    """
    gray_hw = np.nan_to_num(image_hwc.mean(-1, dtype=np.float32))
    shrunk = Image.fromarray(gray_hw).resize((_HASHED, _HASHED), Image.Resampling.BOX)
    frequencies = np.asarray(scipy.fft.dctn(np.asarray(shrunk), norm="ortho"))
    low = frequencies[:_FREQUENCIES, :_FREQUENCIES].ravel()
    low[0] = 0.0  # The brightness.
    return low > np.median(low)


def _isolated(label_hw: np.ndarray) -> float:
    inner = label_hw[1:-1, 1:-1]
    alone = inner != IGNORE_LABEL
    for other in (
        label_hw[:-2, 1:-1],
        label_hw[2:, 1:-1],
        label_hw[1:-1, :-2],
        label_hw[1:-1, 2:],
    ):
        alone &= inner != other
    return float(alone.sum() / label_hw.size)


def _blended(label_hw: np.ndarray) -> float:
    """Returns `Evidence.blended`."""
    between = apart = 0.0
    for rows in (label_hw, label_hw.T):
        one, *middle, other = (
            rows[:, i : rows.shape[1] - 3 + i].astype(np.int16) for i in range(4)
        )
        known = (one != IGNORE_LABEL) & (other != IGNORE_LABEL)
        known &= np.abs(one - other) > 1
        low, high = np.minimum(one, other), np.maximum(one, other)
        mixed = np.any([(low < each) & (each < high) for each in middle], axis=0)
        sharp = np.all([(each == one) | (each == other) for each in middle], axis=0)
        # Of four pixels in a row, three meet a sharp border, and one or two a blend.
        between += (known & mixed).sum() / 1.5
        apart += (known & mixed).sum() / 1.5 + (known & sharp).sum() / 3
    return float(between / apart) if apart else 0.0
