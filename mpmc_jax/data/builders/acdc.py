"""ACDC, cardiac MRI (Bernard et al., 2018), as UniMatch and SSL4MIS use it.

    data/slices/patient003_frame01_slice_1.h5    training: "image", "label" (H,W)
    data/patient002_frame01.h5                   validation: both (slices,H,W)

or the original, which is brought to the same form:

    patient003/patient003_frame01.nii.gz         (X,Y,slices), any intensities
    patient003/patient003_frame01_gt.nii.gz

SOURCE is the folder of data/, data/ itself, or the folder of the patients. Lists, in it
or in its splits/, say what is for which, as published: train_slices.txt names slices,
val.txt and, where there is one, test.txt volumes. Without val.txt, UniMatch's
valtest.txt is for validation. Where there is no .txt, SSL4MIS's own names are read, as
train_slices.list. They call the two frames of a patient frame01 and frame02, whatever
their numbers are in the original.
"""

import collections
import pathlib
import re
from collections.abc import Iterable

from mpmc_jax.data import files, lists
from mpmc_jax.data.builders import volumes
from mpmc_jax.data.builders.volumes import Volume
from mpmc_jax.data.lists import shorten
from mpmc_jax.data.raster_formats import UnreadableImage
from mpmc_jax.data.source import Color, Sample, Source
from mpmc_jax.pixels import PixelFormat

CLASSES: dict[str, Color] = {
    "background": (0, 0, 0),
    "right ventricle": (220, 60, 60),
    "myocardium": (70, 180, 90),
    "left ventricle": (70, 110, 220),
}
# Slices of the published lists: 70 patients, and the 20 volumes of 10.
EXPECTED = {"train": 1312, "val": 210}
# A volume's least value is 0 and its greatest 1; nothing else is done to it.
PIXELS = PixelFormat(1, (0.0,), (1.0,), "float32", low=(0.0,), high=(1.0,))

_TRAIN, _VAL, _BOTH, _TEST = "train_slices.txt", "val.txt", "valtest.txt", "test.txt"
_SLICE = re.compile(r"(patient\d+_frame\d+)_slice_(\d+)")
_ORIGINAL = re.compile(r"(patient\d+)_frame(\d+)\.nii(\.gz)?")


def read_source(directory: pathlib.Path) -> Source:
    """Describes ACDC below or at `directory`; what is amiss is in `.problems`."""
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
        splits["train"] = _files(root / "slices", train, problems)
    else:
        found = _originals(directory, problems)
        if not found:
            problems.append(
                f"{directory}: no data/slices/*.h5, slices/*.h5 or "
                "patientXXX/patientXXX_frameYY.nii.gz; extract the archive there"
            )
        splits["train"] = _cut(directory, found, train, problems)
    for name, keys in listed.items():
        splits[name] = _whole(directory, found, whole[name], keys, problems)
    others = {_patient(key) for keys in listed.values() for key in keys}
    shared = {_patient(key) for key in train} & others
    if shared:
        problems.append(
            f"{directory}: patients for training and for validation: "
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
    """Where a list lies, ending in .txt or .list."""
    places = (
        (directory / place / name).with_suffix(ending)
        for place in ("", "splits", "../splits")
        for ending in (".txt", ".list")
    )
    return next((place for place in places if place.is_file()), None)


def _read_list(
    directory: pathlib.Path, name: str, problems: list[str]
) -> tuple[str, ...]:
    """Names of the slices or volumes, in the list's order."""
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


def _complain(
    directory: pathlib.Path,
    name: str,
    keys: tuple[str, ...],
    absent: Iterable[str],
    problems: list[str],
) -> None:
    absent = list(absent)
    if absent:
        mend = "extract the archive again"
        if len(absent) == len(keys):
            mend = "is it the list of another data set?"
        problems.append(
            f"{directory}: {name} names {len(absent)} of {len(keys)} that are not "
            f"there: {shorten(absent)}; {mend}"
        )


def _files(
    directory: pathlib.Path, keys: tuple[str, ...], problems: list[str]
) -> tuple[Sample, ...]:
    """Training slices, a file each."""
    paths = files.by_stem(directory, ".h5")
    absent = [key for key in keys if key not in paths]
    _complain(directory, _TRAIN, keys, absent, problems)
    return tuple(
        Sample(key, *volumes.h5_slice(paths[key])) for key in keys if key in paths
    )


def _cut(
    directory: pathlib.Path,
    found: dict[str, Volume],
    keys: tuple[str, ...],
    problems: list[str],
) -> tuple[Sample, ...]:
    """Training slices, out of volumes; numbers in their names begin at 1."""
    depths = {key: _depth(volume, problems) for key, volume in found.items()}
    samples, absent = [], []
    for key in keys:
        match = _SLICE.fullmatch(key)
        name, number = match.groups() if match else ("", "0")
        if not 1 <= int(number) <= depths.get(name, 0):
            absent.append(key)
            continue
        samples.append(Sample(key, *found[name].slice(int(number) - 1)))
    _complain(directory, _TRAIN, keys, absent, problems)
    return tuple(samples)


def _whole(
    directory: pathlib.Path,
    found: dict[str, Volume],
    name: str,
    keys: tuple[str, ...],
    problems: list[str],
) -> tuple[Sample, ...]:
    """All slices of the volumes that the list `name` names, in order."""
    absent = [key for key in keys if key not in found]
    _complain(directory, name, keys, absent, problems)
    return tuple(
        Sample(f"{key}_slice_{i + 1}", *found[key].slice(i), volume=key)
        for key in keys
        if key in found
        for i in range(_depth(found[key], problems))
    )


def _depth(volume: Volume, problems: list[str]) -> int:
    """Slices of a volume whose image and labels fit; 0 if they do not."""
    try:
        return volume.depth()
    except (UnreadableImage, OSError) as error:
        problems.append(f"{volume.name}: {error}")
        return 0


def _originals(directory: pathlib.Path, problems: list[str]) -> dict[str, Volume]:
    """Name in the lists -> volume; the frames of a patient are counted from 1."""
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
