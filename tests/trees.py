"""Tiny trees in the exact layout of published data sets, for tests."""

import io
import tarfile

import numpy as np
import scipy.io
from PIL import Image

from mpmc_jax.data.builders import cityscapes, voc

VOC_TRAIN = ("2007_000032", "2007_000039", "2007_000063")
SBD_ONLY = ("2008_000002", "2008_000008", "2008_000015", "2008_000019")
VOC_VAL = ("2007_000033", "2007_000042")
_SIZES = ((40, 56), (36, 48), (48, 36))  # (h,w)
CITIES = {"train": (("aachen", 0), ("bochum", 1)), "val": (("frankfurt", 2),)}
CITY_SHAPE = (1024, 2048)


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
    """SegmentationClassAug beside VOCdevkit, in grey PNG."""
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
    """leftImg8bit and gtFine at full size; returns id -> (h,w) train ids."""
    rng = np.random.default_rng(0)
    labels = {}
    for split, images in CITIES.items():
        for city, number in images:
            name = f"{city}_{number:06d}_000019"
            ids = rng.permutation(np.arange(34, dtype=np.uint8).repeat(4)[:128])
            raw = ids.reshape(8, 16).repeat(128, 0).repeat(128, 1)
            raw[-60:] = 1  # The car that films: void.
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
