"""Slices of medical volumes as images and masks: HDF5 by h5py, NIfTI by nibabel.

Files are not trusted: a dataset whose values lie in another file is refused.
"""

import dataclasses
import functools
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable

import h5py
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Image
from nibabel.spatialimages import HeaderDataError

from mpmc_jax.data import deep, images
from mpmc_jax.data.deep import UnreadableImage
from mpmc_jax.data.source import Derived
from mpmc_jax.types import IGNORE_LABEL

_AFFINE_TOLERANCE = 1e-3
# All slices of a volume are read one after the other, by a few threads.
_CACHED = 8


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image volume with its labels.

    Attributes:
      name: how messages call it.
      depth: -> slices; raises UnreadableImage unless image and labels fit.
      slice: number from 0 -> image and mask.
    """

    name: str
    depth: Callable[[], int]
    slice: Callable[[int], tuple[Derived, Derived]]


def h5_slice(path: pathlib.Path) -> tuple[Derived, Derived]:
    """Image and mask of a file with (H,W) datasets "image" and "label"."""
    return (
        Derived(path, str(path), lambda content: _image(_h5(content, "image", 2))),
        Derived(
            path, f"{path} (label)", lambda content: _mask(_h5(content, "label", 2))
        ),
    )


def from_h5(path: pathlib.Path) -> Volume:
    """A file with (slices,H,W) datasets "image" and "label"."""

    def depth() -> int:
        content = path.read_bytes()
        image, label = _h5(content, "image", 3), _h5(content, "label", 3)
        if image.shape != label.shape:
            raise UnreadableImage(
                f'"image" is {image.shape}, but "label" {label.shape}; both are '
                "(slices,H,W)"
            )
        return len(image)

    def one(i: int) -> tuple[Derived, Derived]:
        return (
            Derived(
                path,
                f"{path}: slice {i + 1}",
                lambda content: _image(_h5(content, "image", 3)[i]),
            ),
            Derived(
                path,
                f"{path}: slice {i + 1} (label)",
                lambda content: _mask(_h5(content, "label", 3)[i]),
            ),
        )

    return Volume(str(path), depth, one)


def from_nifti(path: pathlib.Path, label: pathlib.Path) -> Volume:
    """(X,Y,slices) files; the image is scaled so that its values fill 0..1."""

    def depth() -> int:
        image, mask = _open_nifti(path.read_bytes()), _open_nifti(label.read_bytes())
        if image.shape != mask.shape:
            raise UnreadableImage(
                f"shape {image.shape}, but {label} has {mask.shape}; is it the mask of "
                "another frame?"
            )
        affines = [np.asarray(each.header.get_best_affine()) for each in (image, mask)]
        apart = float(np.abs(affines[0] - affines[1]).max())
        if apart > _AFFINE_TOLERANCE:
            raise UnreadableImage(
                f"its affine differs from that of {label} by up to {apart:.3g}; is it "
                "the mask of another frame, or resampled?"
            )
        return image.shape[2]

    def one(i: int) -> tuple[Derived, Derived]:
        return (
            Derived(
                path,
                f"{path}: slice {i + 1}",
                lambda content: _image(_scaled(content)[i]),
            ),
            Derived(
                label,
                f"{label}: slice {i + 1}",
                lambda content: _mask(_nifti(content)[i]),
            ),
        )

    return Volume(str(path), depth, one)


@functools.lru_cache(_CACHED)
def _h5(content: bytes, key: str, ndim: int) -> np.ndarray:
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            if key not in file:
                raise UnreadableImage(
                    f'no dataset "{key}", only {sorted(file)}; it needs "image" and '
                    '"label"'
                )
            link = file.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise UnreadableImage(
                    f'"{key}" lies in another file, which is not read'
                )
            dataset = file[key]
            if not isinstance(dataset, h5py.Dataset):
                raise UnreadableImage(f'"{key}" is no dataset')
            if dataset.external or dataset.is_virtual:
                raise UnreadableImage(
                    f'"{key}" lies in another file, which is not read'
                )
            _check_shape(f'"{key}"', dataset.shape, dataset.dtype, ndim)
            return np.asarray(dataset[()])
    except OSError as error:
        raise UnreadableImage(f"not an HDF5 file, or damaged ({error})") from error


def _check_shape(name: str, shape: tuple, dtype: np.dtype, ndim: int) -> None:
    wanted = "(slices,H,W)" if ndim == 3 else "(H,W)"
    if len(shape) != ndim or not all(shape):
        raise UnreadableImage(f"{name} has shape {shape}; {wanted} is needed")
    if dtype.kind not in "uif":
        raise UnreadableImage(f"{name} holds {dtype}; numbers are needed")


def _open_nifti(content: bytes) -> Nifti1Image:
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        image = Nifti1Image.from_bytes(content)
    # Damage shows in many ways; nibabel's own errors have no common base.
    except (
        ImageFileError,
        HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        raise UnreadableImage(f"not a NIfTI file, or damaged ({error})") from error
    _check_shape("the volume", image.shape[::-1], np.dtype(image.get_data_dtype()), 3)
    return image


@functools.lru_cache(_CACHED)
def _nifti(content: bytes) -> np.ndarray:
    """(slices,H,W): SimpleITK's order, in which the published slices were made."""
    image = _open_nifti(content)
    try:
        return np.asarray(image.dataobj).transpose()
    except (OSError, ValueError) as error:
        raise UnreadableImage(f"truncated or damaged ({error})") from error


@functools.lru_cache(_CACHED)
def _scaled(content: bytes) -> np.ndarray:
    """As SSL4MIS scales: the whole volume, in double precision, kept in single."""
    values = _nifti(content).astype(np.float64)
    low, high = values.min(), values.max()
    if not high > low:
        raise UnreadableImage(f"the volume is {low} everywhere, or not finite")
    return ((values - low) / (high - low)).astype(np.float32)


def _image(values_hw: np.ndarray) -> bytes:
    return deep.write_array(values_hw.astype(np.float32)[..., None])


def _mask(label_hw: np.ndarray) -> bytes:
    low, high = label_hw.min(), label_hw.max()
    if low < 0 or high > IGNORE_LABEL or (label_hw != np.floor(label_hw)).any():
        raise UnreadableImage(
            f"labels from {low} to {high}; whole numbers from 0 to {IGNORE_LABEL} are "
            "needed"
        )
    return images.encode_png(label_hw.astype(np.uint8))
