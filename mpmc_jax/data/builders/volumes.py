"""Reads slices of medical volumes as images and masks: HDF5 by h5py, NIfTI by nibabel.

Files are not trusted: an HDF5 dataset whose values are in another file is refused, and
so is anything that decompresses to more than `raster_formats.MAX_BYTES`.
"""

import dataclasses
import functools
import gzip
import io
import pathlib
from collections.abc import Callable

import h5py
import numpy as np
from nibabel.nifti1 import Nifti1Image

from mpmc_jax.data import decode, raster_formats
from mpmc_jax.data.masks import MaskFormat
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Derived
from mpmc_jax.text import first_line

_AFFINE_TOLERANCE = 1e-3
# Volumes kept in memory: threads read all slices of a volume one after the other.
_CACHED = 8


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image volume with its labels.

    Attributes:
      name: name for messages.
      depth: returns the number of slices; raises UnreadableImage if image and labels do
        not fit.
      slice: index from 0 -> image and mask.
    """

    name: str
    depth: Callable[[], int]
    slice: Callable[[int], tuple[Derived, Derived]]


def h5_slice(path: pathlib.Path) -> tuple[Derived, Derived]:
    """Returns image and mask of a file with (H,W) datasets "image" and "label"."""
    return (
        Derived(path, str(path), lambda content: _image(_h5(content, "image", 2))),
        Derived(
            path, f"{path} (label)", lambda content: _mask(_h5(content, "label", 2))
        ),
    )


def from_h5(path: pathlib.Path) -> Volume:
    """Returns the volume of a file with (slices,H,W) datasets "image" and "label"."""

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
    """Returns the volume of two (X,Y,slices) files; the image is scaled to 0..1."""

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
            dataset = _dataset(file, key)
            _check_shape(f'"{key}"', dataset.shape, dataset.dtype, ndim)
            _check_chunks(dataset)
            return np.asarray(dataset[()])
    except UnreadableImage:
        raise
    # h5py's errors for damaged files have no common base class.
    except Exception as error:
        raise UnreadableImage(
            f"not an HDF5 file, or damaged ({first_line(error)})"
        ) from error


def _dataset(file: h5py.File, key: str) -> h5py.Dataset:
    """Returns a dataset; raises UnreadableImage unless it is in the file itself."""
    if key not in file:
        raise UnreadableImage(
            f'no dataset "{key}", only {sorted(file)}; it needs "image" and "label"'
        )
    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise UnreadableImage(f'"{key}" is in another file, which is not read')
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise UnreadableImage(f'"{key}" is not a dataset')
    if dataset.external or dataset.is_virtual:
        raise UnreadableImage(f'"{key}" is in another file, which is not read')
    return dataset


def _check_chunks(dataset: h5py.Dataset) -> None:
    """Raises UnreadableImage if a chunk decompresses to too many bytes."""
    if dataset.chunks is None:
        return
    raster_formats.check_bytes(dataset.chunks, dataset.dtype)
    if dataset.compression == "gzip":
        for i in range(dataset.id.get_num_chunks()):
            info = dataset.id.get_chunk_info(i)
            if raster_formats.may_unpack_too_much(info.size):
                _, packed = dataset.id.read_direct_chunk(info.chunk_offset)
                raster_formats.check_deflated(packed)


def _check_shape(name: str, shape: tuple, dtype: np.dtype, ndim: int) -> None:
    wanted = "(slices,H,W)" if ndim == 3 else "(H,W)"
    if len(shape) != ndim or not all(side > 0 for side in shape):
        raise UnreadableImage(f"{name} has shape {shape}; {wanted} is needed")
    if dtype.kind not in "uif":
        raise UnreadableImage(f"{name} holds {dtype}; numbers are needed")
    raster_formats.check_bytes(shape, dtype)


def _open_nifti(content: bytes) -> Nifti1Image:
    try:
        image = Nifti1Image.from_bytes(_unzipped(content))
        shape, dtype = image.shape[::-1], np.dtype(image.get_data_dtype())
    except UnreadableImage:
        raise
    # nibabel's errors for damaged files have no common base class.
    except Exception as error:
        raise UnreadableImage(
            f"not a NIfTI file, or damaged ({first_line(error)})"
        ) from error
    _check_shape("the volume", shape, dtype, 3)
    raster_formats.check_bytes(shape, np.dtype(np.float64))  # For `_scaled`.
    return image


def _unzipped(content: bytes) -> bytes:
    if not content.startswith(b"\x1f\x8b"):
        return content
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(raster_formats.MAX_BYTES + 1)
    if len(unpacked) > raster_formats.MAX_BYTES:
        raise UnreadableImage(
            f"refused: it decompresses to more than {raster_formats.MAX_BYTES} bytes"
        )
    return unpacked


@functools.lru_cache(_CACHED)
def _nifti(content: bytes) -> np.ndarray:
    """Reads (slices,H,W), SimpleITK's order, as for the published slices."""
    image = _open_nifti(content)
    try:
        return np.asarray(image.dataobj).transpose()
    except Exception as error:  # See `_open_nifti`.
        raise UnreadableImage(f"truncated or damaged ({first_line(error)})") from error


@functools.lru_cache(_CACHED)
def _scaled(content: bytes) -> np.ndarray:
    """Scales a whole volume to 0..1 like SSL4MIS, and returns single precision."""
    values = _nifti(content).astype(np.float64)
    low, high = values.min(), values.max()
    if not 0 < high - low < np.inf:
        raise UnreadableImage(f"the volume is {low} everywhere, or not finite")
    return ((values - low) / (high - low)).astype(np.float32)


def _image(values_hw: np.ndarray) -> bytes:
    return raster_formats.write_array(values_hw.astype(np.float32)[..., None])


def _mask(label_hw: np.ndarray) -> bytes:
    return decode.encode_png(MaskFormat().labels(label_hw))
