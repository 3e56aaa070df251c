"""Tiny trees in the exact layout of published data sets, for tests."""

import io
import tarfile

import h5py
import nibabel
import numpy as np
import scipy.io
from PIL import Image

from mpmc_jax.data.builders import cityscapes, voc

VOC_TRAIN = ("2007_000032", "2007_000039", "2007_000063")
SBD_ONLY = ("2008_000002", "2008_000008", "2008_000015", "2008_000019")
VOC_VAL = ("2007_000033", "2007_000042")
_SIZES = ((40, 56), (36, 48), (48, 36))  # (h,w)
CITIES = {"train": (("aachen", 0), ("bochum", 1)), "val": (("frankfurt", 2),)}
CITY_SHAPE = (512, 1024)


def voc_labels(void=True):
    """Id -> (h,w) labels of every image of the VOC tree; SBD's masks have no void."""
    rng = np.random.default_rng(0)
    labels = {}
    for i, key in enumerate((*VOC_TRAIN, *SBD_ONLY, *VOC_VAL)):
        label = np.zeros(_SIZES[i % 3], np.uint8)
        label[4:20, 6:30] = 1 + i % 20
        label[24:, 10:] = rng.integers(0, 21, label[24:, 10:].shape)
        if key not in SBD_ONLY and void:
            label[3, 6:30] = 255
        labels[key] = label
    return labels


def make_voc(root):
    """VOCdevkit/VOC2012 as its archive unpacks below `root`; returns id -> labels."""
    base = root / "VOCdevkit" / "VOC2012"
    lists = base / "ImageSets" / "Segmentation"
    for folder in (base / "JPEGImages", base / "SegmentationClass", lists):
        folder.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(VOC_TRAIN) + "\n")
    (lists / "val.txt").write_text("\n".join(VOC_VAL))
    labels = voc_labels()
    rng = np.random.default_rng(1)
    flat = [value for color in voc.palette() for value in color]
    for key, label in labels.items():
        image = rng.integers(0, 256, (*label.shape, 3), dtype=np.uint8)
        Image.fromarray(image).save(base / "JPEGImages" / f"{key}.jpg")
        if key not in SBD_ONLY:
            mask = Image.fromarray(label)
            mask.putpalette(flat)
            mask.save(base / "SegmentationClass" / f"{key}.png")
    return labels


def mat_bytes(label):
    """SBD's own file: GTcls with Boundaries, Segmentation and CategoriesPresent."""
    stream = io.BytesIO()
    record = {
        "Boundaries": np.zeros((20, 1), object),
        "Segmentation": label,
        "CategoriesPresent": np.unique(label[label > 0])[:, None],
    }
    scipy.io.savemat(stream, {"GTcls": record}, do_compression=True)
    return stream.getvalue()


def _sbd_labels():
    """SBD has masks of some of VOC's images, of its val too; they have no void."""
    keys = (*SBD_ONLY, VOC_TRAIN[0], VOC_VAL[0])
    return {key: np.full_like(voc_labels()[key], 0) for key in keys} | {
        key: voc_labels()[key] for key in SBD_ONLY
    }


def add_aug(root):
    """SegmentationClassAug beside VOCdevkit, in gray PNG."""
    folder = root / "SegmentationClassAug"
    folder.mkdir()
    for key, label in _sbd_labels().items():
        Image.fromarray(label).save(folder / f"{key}.png")


def add_sbd(root):
    """SBD as its archive unpacks."""
    folder = root / "benchmark_RELEASE" / "dataset" / "cls"
    folder.mkdir(parents=True)
    for key, label in _sbd_labels().items():
        (folder / f"{key}.mat").write_bytes(mat_bytes(label))


def add_archive(root, extra=()):
    """SBD's benchmark.tgz, with further members (TarInfo) if wished."""
    with tarfile.open(root / "benchmark.tgz", "w:gz") as archive:
        for key, label in _sbd_labels().items():
            content = mat_bytes(label)
            name = f"benchmark_RELEASE/dataset/cls/{key}.mat"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in extra:
            archive.addfile(member, io.BytesIO(b""))


def make_cityscapes(root, kind="labelIds"):
    """leftImg8bit and gtFine at half the size; returns id -> (h,w) train ids."""
    rng = np.random.default_rng(0)
    labels = {}
    for split, images in CITIES.items():
        for city, number in images:
            name = f"{city}_{number:06d}_000019"
            ids = rng.permutation(np.arange(34, dtype=np.uint8).repeat(4)[:128])
            raw = ids.reshape(8, 16).repeat(64, 0).repeat(64, 1)
            raw[-30:] = 1  # The car that films: void.
            table = np.full(256, 255, np.uint8)
            for i, value in enumerate(cityscapes.LABEL_IDS):
                table[value] = i
            label = table[raw]
            labels[f"{name}_leftImg8bit"] = label
            image = raw[..., None] * np.array([3, 5, 7], np.uint8)
            image[::7] += 11
            for folder, end, array in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", f"gtFine_{kind}", raw if kind == "labelIds" else label),
            ):
                path = root / folder / split / city / f"{name}_{end}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, compress_level=1)
    return labels


# Volume -> slices, rows, columns; the frames' numbers in the original are others.
ACDC_VOLUMES = {
    "patient001_frame01": (3, 40, 36),
    "patient001_frame02": (3, 40, 36),
    "patient002_frame01": (2, 32, 48),
    "patient002_frame02": (2, 32, 48),
    "patient003_frame01": (4, 44, 32),
    "patient003_frame02": (4, 44, 32),
}
ACDC_VAL = ("patient003_frame02", "patient003_frame01")


def acdc_volumes():
    """Name -> (slices,h,w) raw intensities, and labels with every class in a slice."""
    rng = np.random.default_rng(0)
    found = {}
    for name, (depth, rows, columns) in ACDC_VOLUMES.items():
        label = np.zeros((depth, rows, columns), np.uint8)
        for i in range(depth):
            label[i, 6:28, 6 + i : 26 + i] = 1
            label[i, 10:24, 10 + i : 22] = 2
            label[i, 12 : 20 - i, 12:20] = 3
        raw = rng.integers(3, 90, label.shape, dtype=np.int16) + 300 * label.astype(
            np.int16
        )
        found[name] = raw.astype(np.int16), label
    return found


def acdc_lists(root):
    """train_slices.txt, val.txt and, for one labeled case, 1/; as published."""
    slices = [
        f"data/slices/{name}_slice_{i + 1}.h5"
        for name, (depth, *_) in reversed(ACDC_VOLUMES.items())
        if name not in ACDC_VAL
        for i in range(depth)
    ]
    splits = root / "splits"
    (splits / "1").mkdir(parents=True)
    (splits / "train_slices.txt").write_text("\n".join(slices))
    (splits / "val.txt").write_text("".join(f"data/{name}.h5\n" for name in ACDC_VAL))
    labeled = [line for line in slices if "patient001" in line]
    unlabeled = [line for line in slices if line not in labeled]
    (splits / "1" / "labeled.txt").write_text("\n".join(labeled))
    (splits / "1" / "unlabeled.txt").write_text("\n".join(unlabeled))


def write_h5(path, image, label, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=image, **settings)
        file.create_dataset("label", data=label, **settings)


def make_acdc_h5(root):
    """SSL4MIS's layout: slices for training, whole volumes for validation."""
    acdc_lists(root)
    for name, (raw, label) in acdc_volumes().items():
        unit = (raw - raw.min()) / (raw.max() - raw.min())
        image = unit.astype(np.float32)
        if name in ACDC_VAL:
            write_h5(root / "data" / f"{name}.h5", image, label, compression="gzip")
            continue
        for i in range(len(image)):
            path = root / "data" / "slices" / f"{name}_slice_{i + 1}.h5"
            write_h5(path, image[i], label[i], compression="gzip")


def write_nifti(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.5, 1.5, 10.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.nifti1.Nifti1Image(values.transpose(), affine), path)


def make_acdc_nifti(root):
    """The original layout: frames by their number in the film, axes (X,Y,slices)."""
    acdc_lists(root)
    for name, (raw, label) in acdc_volumes().items():
        patient, frame = name.split("_")
        number = {"frame01": 1, "frame02": 12}[frame]
        stem = root / patient / f"{patient}_frame{number:02d}"
        write_nifti(stem.with_name(f"{stem.name}.nii.gz"), raw)
        write_nifti(stem.with_name(f"{stem.name}_gt.nii.gz"), label)
