"""The files of a prediction: pictures, probabilities, classes of patches.

Every file holds a mark of this program, so that no other file is replaced. Large images
are written as they are predicted, band by band.
"""

import gzip
import math
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import tifffile
from nibabel.nifti1 import Nifti1Image
from PIL import Image, PngImagePlugin

from mpmc_jax.atomic_write import replacing, write_bytes
from mpmc_jax.evaluation.pictures import Palette, as_png, colorize, overlay
from mpmc_jax.evaluation.predict import Band

# What is written -> the file's ending; in GeoTIFF for images with a georeference.
KINDS = {
    "index": ".png",
    "color": ".png",
    "overlay": ".png",
    "entropy": ".png",
    "probabilities": ".npz",
    "patches": ".npz",
}
PICTURES = ("index", "color", "overlay")
_GEOREFERENCED = ("index", "probabilities")
_NEED_PROBABILITIES = {"entropy", "probabilities"}

# A file of predictions has it among its first bytes.
MARK = "mpmc_jax.launch.predict"
_HEAD = 2048
_SUFFIXES = (".png", ".npz", ".tif", ".gz")
# Above this, TIFF needs 64-bit offsets.
_LARGE_TIFF = (1 << 32) - (1 << 25)

# The arguments of tifffile for a tag: code, type, count, value, whether it is written
# once.
Tags = Sequence[tuple[int, Any, int, Any, bool]]


def check_kinds(kinds: Sequence[str], *, patches: bool) -> None:
    """Raises ValueError unless these files can be written.

    Args:
      kinds: what to write, of `KINDS`.
      patches: whether the run classifies patches.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(
            f"--outputs={','.join(kinds)}: {unknown[0]!r} is unknown; valid: "
            f"{', '.join(KINDS)}"
        )
    if not kinds:
        raise ValueError(f"--outputs names nothing to write; valid: {', '.join(KINDS)}")
    if "patches" in kinds and not patches:
        raise ValueError(
            "--outputs=patches: this run has no patch classifier (it was trained with "
            "mpmc=off, or is an exported file); leave out patches"
        )


def need_probabilities(kinds: Iterable[str]) -> bool:
    """Whether these files are made from probabilities."""
    return not _NEED_PROBABILITIES.isdisjoint(kinds)


def paths(
    stem: pathlib.Path, kinds: Sequence[str], *, georeferenced: bool = False
) -> dict[str, pathlib.Path]:
    """The file of each kind: STEM_index.png, ..."""

    def ending(kind: str) -> str:
        return ".tif" if georeferenced and kind in _GEOREFERENCED else KINDS[kind]

    return {kind: stem.with_name(f"{stem.name}_{kind}{ending(kind)}") for kind in kinds}


def is_prediction(path: pathlib.Path) -> bool:
    """Whether a file is one that this program wrote; False if it is unreadable."""
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        return MARK.encode() in file.read(_HEAD)


def write_prediction(
    targets: Mapping[str, pathlib.Path],
    bands: Iterable[Band],
    image: np.ndarray,
    palette: Palette,
    *,
    tags: Tags = (),
    patches: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Writes the files of one image.

    Args:
      targets: the file of each kind, see `paths`; their folder must exist.
      bands: the predictions, from top to bottom, with probabilities if a file needs
        them.
      image: (h,w,1 or 3) uint8, as displayed.
      palette: class -> RGB.
      tags: the georeference of the image.
      patches: the arrays of "patches", if that is written.

    Returns:
      The classes (h,w) uint8.
    """
    classes = np.empty(image.shape[:2], np.uint8)
    entropy = np.empty(image.shape[:2], np.uint8) if "entropy" in targets else None

    def probabilities() -> Iterator[np.ndarray]:
        for band in bands:
            rows = slice(band.top, band.top + len(band.classes))
            classes[rows] = band.classes
            if band.probabilities is not None:
                if entropy is not None:
                    entropy[rows] = np.rint(255 * relative_entropy(band.probabilities))
                yield band.probabilities

    if (path := targets.get("probabilities")) is None:
        for _ in probabilities():
            pass
    else:
        shape = (*classes.shape, len(palette))
        with replacing(path) as file:
            _write_probabilities(file, probabilities(), shape, path.suffix, tags)
    if path := targets.get("index"):
        _write_index(path, classes, palette, tags)
    if "color" in targets or "overlay" in targets:
        colors = colorize(classes, palette)
        if path := targets.get("color"):
            _write_png(path, colors)
        if path := targets.get("overlay"):
            _write_png(path, overlay(image, colors))
    if entropy is not None:
        _write_png(targets["entropy"], entropy)
    if patches is not None and (path := targets.get("patches")):
        with replacing(path) as file:
            _write_arrays(file, patches)
    return classes


def write_volume(path: pathlib.Path, classes: np.ndarray, like: Nifti1Image) -> None:
    """Writes classes (slices,Y,X) as a NIfTI volume on the grid of another volume."""
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    volume = Nifti1Image(classes.transpose(), like.affine, header)
    with (
        replacing(path) as file,
        # The name in its header is the mark; no time, so that files are comparable.
        gzip.GzipFile(MARK, "wb", 1, file, mtime=0) as packed,
    ):
        packed.write(volume.to_bytes())


def relative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """The entropy of (h,w,C) probabilities, 1 where all classes are equally likely."""
    logs = np.log(
        probabilities, where=probabilities > 0, out=np.zeros_like(probabilities)
    )
    total = -(probabilities * logs).sum(-1) / np.log(max(probabilities.shape[-1], 2))
    return np.clip(total, 0, 1)


def _write_index(
    path: pathlib.Path, classes: np.ndarray, palette: Palette, tags: Tags
) -> None:
    """Writes the classes with a palette: values are classes, viewers show colors."""
    table = colorize(np.arange(256), palette)
    if path.suffix == ".png":
        # A palette turns a gray picture into mode "P" and leaves its values unchanged.
        indexed = Image.fromarray(classes)
        indexed.putpalette(table.tobytes())
        _write_png(path, indexed)
        return
    with replacing(path) as file:
        tifffile.imwrite(
            file,
            classes,
            photometric="palette",
            colormap=257 * table.T.astype(np.uint16),
            compression="deflate",
            description=MARK,
            metadata=None,
            extratags=tags,
        )


def _write_png(path: pathlib.Path, picture: np.ndarray | Image.Image) -> None:
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    write_bytes(path, as_png(picture, pnginfo=mark))


def _write_probabilities(
    file: BinaryIO,
    parts: Iterator[np.ndarray],
    shape: tuple[int, ...],
    suffix: str,
    tags: Tags,
) -> None:
    """Writes (h,w,C): half precision in .npz, single precision in GeoTIFF."""
    if suffix == ".npz":
        with zipfile.ZipFile(file, "w") as archive:
            _add_array(archive, "software", np.array(MARK.encode()))
            with archive.open(
                zipfile.ZipInfo("probabilities.npy"), "w", force_zip64=True
            ) as member:
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part, "<f2").data)
        return
    tifffile.imwrite(
        file,
        (row[None] for part in parts for row in part.astype(np.float32)),
        shape=shape,
        dtype=np.float32,
        photometric="minisblack",
        planarconfig="contig",
        rowsperstrip=1,
        description=MARK,
        metadata=None,
        extratags=tags,
        bigtiff=4 * math.prod(shape) > _LARGE_TIFF,
    )


def _write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in ({"software": np.array(MARK.encode())} | {**arrays}).items():
            _add_array(archive, name, array)


def _add_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # The date of a ZipInfo is fixed, so that equal predictions are equal files.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
