"""ACDC as .h5 and as NIfTI: equal when prepared, each damage named."""

import io
import shutil

import h5py
import numpy as np
import pytest

from launch import check_data, prepare_data
from mpmc_jax.data import build, lists
from mpmc_jax.data.builders import acdc
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.types import Streams
from tests.support import trees
from tests.support.data_sets import config_for, real

MAKE = {"h5": trees.make_acdc_h5, "nifti": trees.make_acdc_nifti}


def prepare(root, data_dir):
    named = ["--dataset=acdc", f"--source={root}"]
    check_data.main(named)
    prepare_data.main([*named, f"--data_dir={data_dir}"])
    check_data.main(["--dataset=acdc", f"--data_dir={data_dir}"])
    return open_dataset(str(data_dir), "acdc")


def test_both_layouts_are_prepared_equal(tmp_path, capsys):
    found = {}
    for kind, make in MAKE.items():
        make(tmp_path / kind)
        found[kind] = prepare(tmp_path / kind, tmp_path / f"{kind}_data")
        out = capsys.readouterr().out
        assert f"{'train':>8}{10:>8}{1312:>11}" in out and "PARTIAL" in out
    h5, nifti = found["h5"], found["nifti"]
    assert h5.ids == nifti.ids and h5.contents == nifti.contents
    assert h5.volumes == nifti.volumes and h5.facts.pixels == nifti.facts.pixels
    config = config_for(tmp_path / "nifti_data", "acdc")
    source = build.build_eval(config)
    expected = [name for name in trees.ACDC_VAL for _ in range(4)]
    assert list(source.volumes) == expected
    for position, name in enumerate(trees.ACDC_VAL):
        raw, label = trees.acdc_volumes()[name]
        unit = ((raw - raw.min()) / (raw.max() - raw.min())).astype(np.float32)
        for i in range(4):
            example = source[4 * position + i]
            assert example.id == f"{name}_slice_{i + 1}"
            np.testing.assert_array_equal(example.image[..., 0], unit[i])
            np.testing.assert_array_equal(example.label, label[i])


def test_the_lists_say_what_is_validated(tmp_path):
    trees.make_acdc_h5(tmp_path)
    listed = (tmp_path / "splits" / "val.txt").read_text()
    first, *others = listed.splitlines()
    for name, lines in (("val", [first]), ("test", others), ("valtest", [first])):
        (tmp_path / "splits" / f"{name}.txt").write_text("\n".join(lines))
    source = acdc.read_source(tmp_path)
    volumes = {
        name: list(dict.fromkeys(sample.volume for sample in samples))
        for name, samples in source.splits.items()
    }
    names = list(trees.ACDC_VAL)
    assert volumes == {"train": [""], "val": names[:1], "test": names[1:]}
    assert source.expected == acdc.EXPECTED
    # UniMatch publishes one list for both, whose counts are others.
    (tmp_path / "splits" / "val.txt").unlink()
    (tmp_path / "splits" / "test.txt").unlink()
    source = acdc.read_source(tmp_path)
    assert {sample.volume for sample in source.splits["val"]} == {names[0]}
    assert set(source.expected) == {"train"} and not source.problems


def test_lists_under_the_names_of_ssl4mis_and_hidden_files(tmp_path):
    trees.make_acdc_h5(tmp_path)
    expected = acdc.read_source(tmp_path)
    for name in ("train_slices", "val"):
        (tmp_path / "splits" / f"{name}.txt").rename(tmp_path / f"{name}.list")
    for path in ("data/._patient003_frame01.h5", "data/slices/._x.h5"):
        (tmp_path / path).write_bytes(b"\0\5\26\7")
    source = acdc.read_source(tmp_path)
    assert source.problems == ()
    assert [s.id for s in source.splits["train"]] == [
        s.id for s in expected.splits["train"]
    ]
    assert len(source.splits["val"]) == len(expected.splits["val"]) == 8


def test_crops_as_unimatch_makes_them(tmp_path, capsys):
    trees.make_acdc_h5(tmp_path / "src")
    prepare(tmp_path / "src", tmp_path / "data")
    capsys.readouterr()
    config = config_for(tmp_path / "data", "acdc", crop=24)
    folder = tmp_path / "src" / "splits" / "1"
    config.data.labeled_ids = str(folder / "labeled.txt")
    config.data.unlabeled_ids = str(folder / "unlabeled.txt")
    config.data.geometry = "acdc"
    config.data.partner = "other"
    pipeline = build.build_train(config, Streams(partner="same"))
    assert (pipeline.num_labeled, pipeline.num_unlabeled) == (6, 4)
    iterator = pipeline.iterator()
    batches = [next(iterator) for _ in range(12)]
    iterator.close()
    for batch in batches:
        assert batch.labeled.image.dtype == np.float32
        assert batch.labeled.image.shape == (4, 24, 24, 1)
        assert batch.unlabeled.image.dtype == batch.partner.image.dtype == np.uint8
        assert (batch.labeled.extent == [0, 0, 24, 24]).all()
        assert not (batch.labeled.label == 255).any()
    # An epoch is one step: every image once, partners in another order.
    orders = [(b.unlabeled.index.tolist(), b.partner.index.tolist()) for b in batches]
    assert all(sorted(a) == sorted(b) == [0, 1, 2, 3] for a, b in orders)
    assert sum(a != b for a, b in orders) > 6
    again = pipeline.iterator(5)
    np.testing.assert_array_equal(next(again).partner.image, batches[5].partner.image)
    again.close()


def test_partners_are_for_methods_that_mix_crops(tmp_path, capsys):
    trees.make_acdc_h5(tmp_path / "src")
    prepare(tmp_path / "src", tmp_path / "data")
    capsys.readouterr()
    config = config_for(tmp_path / "data", "acdc")
    config.data.partner = "other"
    with pytest.raises(ValueError, match="data.partner='other'.*unimatch"):
        build.build_train(config, Streams(partner="requested"))


def damage(name):
    """Decorates what spoils a tree, with the messages expected."""

    def note(function):
        DAMAGES[function.__name__] = (name, function)
        return function

    return note


DAMAGES = {}
VOLUME = "data/patient003_frame01.h5"
RAW = "patient003/patient003_frame01"


@damage("patient003_frame01.h5: no dataset \"label\", only .'image'.")
def h5_without_label(root):
    with h5py.File(root / VOLUME, "a") as file:
        del file["label"]


@damage('patient003_frame01.h5: "image" is .4, 44, 32., but "label" .4, 44, 30.')
def h5_of_two_sizes(root):
    image, label = np.zeros((4, 44, 32), "f4"), np.zeros((4, 44, 30), "u1")
    trees.write_h5(root / VOLUME, image, label)


@damage('patient001_frame01_slice_1.h5: "image" has shape .2, 8, 8.; .H,W. is needed')
def h5_volume_for_a_slice(root):
    path = root / "data" / "slices" / "patient001_frame01_slice_1.h5"
    trees.write_h5(path, np.zeros((2, 8, 8), "f4"), np.zeros((2, 8, 8), "u1"))


@damage("patient003_frame01.h5: not an HDF5 file, or damaged")
def h5_truncated(root):
    content = (root / VOLUME).read_bytes()
    (root / VOLUME).write_bytes(content[: len(content) // 2])


@damage('patient003_frame01.h5: "image" is in another file, which is not read')
def h5_that_reads_another_file(root):
    secret = root.parent / "secret.bin"
    secret.write_bytes(bytes(4 * 44 * 32 * 4))
    with h5py.File(root / VOLUME, "a") as file:
        del file["image"]
        file.create_dataset(
            "image",
            (4, 44, 32),
            "f4",
            external=[(str(secret), 0, h5py.h5f.UNLIMITED)],
        )


@damage('patient003_frame01.h5: "image" is in another file, which is not read')
def h5_with_an_external_link(root):
    other = root.parent / "other.h5"
    shutil.copy(root / VOLUME, other)
    with h5py.File(root / VOLUME, "a") as file:
        del file["image"]
        file["image"] = h5py.ExternalLink(str(other), "/image")


@damage("names 2 of 2 that do not exist: .*; is it the list of another data set")
def lists_of_another_data_set(root):
    (root / "splits" / "val.txt").write_text("2007_000032\n2007_000039\n")


@damage("val.txt: no such list")
def no_list(root):
    (root / "splits" / "val.txt").unlink()


@damage("for training and for validation: patient003")
def a_patient_in_both(root):
    shutil.copy(root / VOLUME, root / "data" / "patient001_frame01.h5")
    with (root / "splits" / "train_slices.txt").open("a") as file:
        file.write("\ndata/slices/patient003_frame01_slice_1.h5")


@damage("frame01.nii.gz: shape .32, 44, 4., but .*frame01_gt.nii.gz has .32, 40, 4.")
def nifti_mask_of_another_shape(root):
    trees.write_nifti(root / f"{RAW}_gt.nii.gz", np.zeros((4, 40, 32), "u1"))


@damage("frame01.nii.gz: its affine differs .* by up to 0.5")
def nifti_mask_of_another_affine(root):
    affine = np.diag([1.0, 1.5, 10.0, 1.0])
    trees.write_nifti(root / f"{RAW}_gt.nii.gz", np.zeros((4, 44, 32), "u1"), affine)


@damage("frame01.nii.gz: no patient003_frame01_gt.nii.gz beside it")
def nifti_without_mask(root):
    (root / f"{RAW}_gt.nii.gz").unlink()


@damage("frame01.nii.gz: not a NIfTI file, or damaged")
def nifti_truncated(root):
    content = (root / f"{RAW}.nii.gz").read_bytes()
    (root / f"{RAW}.nii.gz").write_bytes(content[: len(content) // 2])


@damage("values 0.5 are neither a class nor void")
def nifti_mask_of_fractions(root):
    label = np.full((4, 44, 32), 0.5, "f4")
    label[0, 0, 0] = -1
    trees.write_nifti(root / f"{RAW}_gt.nii.gz", label)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name, tmp_path):
    message, spoil = DAMAGES[name]
    MAKE["nifti" if name.startswith("nifti") else "h5"](tmp_path / "src")
    spoil(tmp_path / "src")
    with pytest.raises(SystemExit, match=message):
        check_data.main(["--dataset=acdc", f"--source={tmp_path / 'src'}"])


def test_an_external_file_is_never_read(tmp_path):
    trees.make_acdc_h5(tmp_path / "src")
    h5_that_reads_another_file(tmp_path / "src")
    content = (tmp_path / "src" / VOLUME).read_bytes()
    with h5py.File(io.BytesIO(content)) as file:  # The trap works.
        assert file["image"][()].shape == (4, 44, 32)


def test_the_real_data_set_has_the_published_counts():
    root = real("acdc")
    source = acdc.read_source(root)
    assert not source.problems and not source.partial
    assert len(source.splits["train"]) == 1312
    assert len({sample.volume for sample in source.splits["val"]}) == 20
    known = {sample.id for sample in source.splits["train"]}
    for cases, labeled in ((1, 32), (3, 68), (7, 136)):
        parts = [
            lists.read_lines(root / "splits" / str(cases) / f"{part}.txt")
            for part in ("labeled", "unlabeled")
        ]
        found = [[lists.resolve(line, known) for line in part] for part in parts]
        assert len(found[0]) == labeled and len(found[1]) == 1312 - labeled
        assert {*found[0], *found[1]} == known
