"""ACDC, cardiac MRI (Bernard et al., 2018), as UniMatch and SSL4MIS use it.

    data/slices/patient003_frame01_slice_1.h5    training: "image", "label" (H,W)
    data/patient002_frame01.h5                   validation: both (slices,H,W)

or the original, which is converted to the same form:

    patient003/patient003_frame01.nii.gz         (X,Y,slices), any intensities
    patient003/patient003_frame01_gt.nii.gz

SOURCE is the folder of data/, data/ itself, or the folder of the patients. The
published lists are in it or in its splits/: train_slices.txt names slices; val.txt and,
if it exists, test.txt name volumes. Without val.txt, UniMatch's valtest.txt is used for
validation. Lists may have SSL4MIS's ending, as train_slices.list. They call the two
frames of a patient frame01 and frame02, whatever their numbers in the original.
"""

import collections
import pathlib
import re
from collections.abc import Iterable

from mpmc_jax.data import files, lists
from mpmc_jax.data.builders import volumes
from mpmc_jax.data.builders.volumes import Volume
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Color, Sample, Source
from mpmc_jax.pixels import PixelFormat
from mpmc_jax.text import shorten

CLASSES: dict[str, Color] = {
    "background": (0, 0, 0),
    "right ventricle": (220, 60, 60),
    "myocardium": (70, 180, 90),
    "left ventricle": (70, 110, 220),
}
# Slices in the published lists: 70 patients, and 20 volumes of 10 patients.
EXPECTED = {"train": 1312, "val": 210}
# Volumes are scaled to 0..1 and not normalized further.
PIXELS = PixelFormat(1, (0.0,), (1.0,), "float32", low=(0.0,), high=(1.0,))

_TRAIN, _VAL, _BOTH, _TEST = "train_slices.txt", "val.txt", "valtest.txt", "test.txt"
_SLICE = re.compile(r"(patient\d+_frame\d+)_slice_(\d+)")
_ORIGINAL = re.compile(r"(patient\d+)_frame(\d+)\.nii(\.gz)?")


def read_source(directory: pathlib.Path) -> Source:
    """Describes ACDC in or below `directory`; `.problems` lists what is wrong."""
    problems: list[str] = []
    train = _read_list(directory, _TRAIN, problems)
    whole = {"val": _VAL}
    if _find(directory, _VAL) is None and _find(directory, _BOTH) is not None:
        whole = {"val": _BOTH}
    if _find(directory, _TEST) is not None:
        whole["test"] = _TEST
    listed = {name: _read_list(directory, at, problems) for name, at in whole.items()}
    root = next(
        (at for at in (directory / "data", directory) if (at / "slices").is_dir()), None
    )
    splits: dict[str, tuple[Sample, ...]] = {"train": (), "val": ()}
    if root is not None:
        found = {
            key: volumes.from_h5(path)
            for key, path in files.by_stem(root, ".h5").items()
        }
        splits["train"] = _slice_files(root / "slices", train, problems)
    else:
        found = _originals(directory, problems)
        if not found:
            problems.append(
                f"{directory}: no data/slices/*.h5, slices/*.h5 or "
                "patientXXX/patientXXX_frameYY.nii.gz; extract the archive there"
            )
        splits["train"] = _slices_of_volumes(directory, found, train, problems)
    for name, keys in listed.items():
        splits[name] = _whole_volumes(directory, found, whole[name], keys, problems)
    others = {_patient(key) for keys in listed.values() for key in keys}
    shared = {_patient(key) for key in train} & others
    if shared:
        problems.append(
            f"{directory}: patients both for training and for validation: "
            f"{shorten(sorted(shared))}"
        )
    return Source(
        name="acdc",
        class_names=tuple(CLASSES),
        palette=tuple(CLASSES.values()),
        pixels=PIXELS,
        splits=splits,
        problems=tuple(problems),
        expected={
            name: number
            for name, number in EXPECTED.items()
            if whole.get(name) != _BOTH
        },
    )


def _patient(key: str) -> str:
    return key.partition("_")[0]


def _find(directory: pathlib.Path, name: str) -> pathlib.Path | None:
    """Finds a list, with the ending .txt or .list."""
    places = (
        (directory / place / name).with_suffix(ending)
        for place in ("", "splits", "../splits")
        for ending in (".txt", ".list")
    )
    return next((place for place in places if place.is_file()), None)


def _read_list(
    directory: pathlib.Path, name: str, problems: list[str]
) -> tuple[str, ...]:
    """Reads the names of slices or volumes, in the list's order."""
    path = _find(directory, name)
    if path is None:
        problems.append(
            f"{directory / name}: no such list, nor in splits/; SSL4MIS publishes it"
        )
        return ()
    try:
        lines = lists.read_lines(path)
    except ValueError as error:
        problems.append(str(error))
        return ()
    keys = [pathlib.PurePosixPath(line).name.removesuffix(".h5") for line in lines]
    return tuple(lists.unique(keys, path, problems))


def _report_absent(
    directory: pathlib.Path,
    name: str,
    keys: tuple[str, ...],
    absent: Iterable[str],
    problems: list[str],
) -> None:
    absent = list(absent)
    if absent:
        hint = "extract the archive again"
        if len(absent) == len(keys):
            hint = "is it the list of another data set?"
        problems.append(
            f"{directory}: {name} names {len(absent)} of {len(keys)} that do not "
            f"exist: {shorten(absent)}; {hint}"
        )


def _slice_files(
    directory: pathlib.Path, keys: tuple[str, ...], problems: list[str]
) -> tuple[Sample, ...]:
    """Returns the training slices that are one file each."""
    paths = files.by_stem(directory, ".h5")
    absent = [key for key in keys if key not in paths]
    _report_absent(directory, _TRAIN, keys, absent, problems)
    return tuple(
        Sample(key, *volumes.h5_slice(paths[key])) for key in keys if key in paths
    )


def _slices_of_volumes(
    directory: pathlib.Path,
    found: dict[str, Volume],
    keys: tuple[str, ...],
    problems: list[str],
) -> tuple[Sample, ...]:
    """Returns the training slices of volumes; numbers in their names begin at 1."""
    depths = {key: _depth(volume, problems) for key, volume in found.items()}
    samples, absent = [], []
    for key in keys:
        match = _SLICE.fullmatch(key)
        name, number = match.groups() if match else ("", "0")
        if not 1 <= int(number) <= depths.get(name, 0):
            absent.append(key)
            continue
        samples.append(Sample(key, *found[name].slice(int(number) - 1)))
    _report_absent(directory, _TRAIN, keys, absent, problems)
    return tuple(samples)


def _whole_volumes(
    directory: pathlib.Path,
    found: dict[str, Volume],
    name: str,
    keys: tuple[str, ...],
    problems: list[str],
) -> tuple[Sample, ...]:
    """Returns all slices of the volumes in the list `name`, in order."""
    absent = [key for key in keys if key not in found]
    _report_absent(directory, name, keys, absent, problems)
    return tuple(
        Sample(f"{key}_slice_{i + 1}", *found[key].slice(i), volume=key)
        for key in keys
        if key in found
        for i in range(_depth(found[key], problems))
    )


def _depth(volume: Volume, problems: list[str]) -> int:
    """Returns a volume's number of slices; 0, and a problem, if it is not usable."""
    try:
        return volume.depth()
    except (UnreadableImage, OSError) as error:
        problems.append(f"{volume.name}: {error}")
        return 0


def _originals(directory: pathlib.Path, problems: list[str]) -> dict[str, Volume]:
    """Finds the original volumes, by name in the lists.

    These names count the frames of a patient from 1.
    """
    frames = collections.defaultdict(list)
    for path in sorted(directory.glob("patient*/patient*_frame*.nii*")):
        match = _ORIGINAL.fullmatch(path.name)
        if match:
            frames[match[1]].append((int(match[2]), path))
    found = {}
    for patient, numbered in frames.items():
        for i, (_, path) in enumerate(sorted(numbered)):
            labels = [
                path.with_name(path.name.replace(".nii", "_gt.nii", 1)),
                path.with_name(path.name.split(".")[0] + "_gt.nii.gz"),
                path.with_name(path.name.split(".")[0] + "_gt.nii"),
            ]
            label = next((at for at in labels if at.is_file()), None)
            if label is None:
                problems.append(f"{path}: no {labels[0].name} beside it")
                continue
            found[f"{patient}_frame{i + 1:02d}"] = volumes.from_nifti(path, label)
    return found
