import dataclasses
import subprocess
import sys

import chex
import numpy as np
import pytest

from mpmc_jax.data import build, check, decode, registry, source
from mpmc_jax.data.builders import synthetic
from mpmc_jax.data.geometry import registry as geometries
from mpmc_jax.data.pipeline import TrainPipeline
from mpmc_jax.pixels import GRAY, RGB
from mpmc_jax.types import Streams
from tests.support.data_sets import (
    SIZES,
    config_for,
    make_folder,
    take_batches,
)


def _with_records(pipeline, config, edit):
    """The same pipeline over records that `edit` has changed."""
    records = [edit(dict(record)) for record in pipeline._info.records("train")]

    @dataclasses.dataclass(frozen=True)
    class Edited(type(pipeline._info)):
        def records(self, split):
            return records

    facts = {
        f.name: getattr(pipeline._info, f.name)
        for f in dataclasses.fields(pipeline._info)
    }
    return TrainPipeline(Edited(**facts), pipeline.split, config)


def test_unlabeled_masks_are_never_opened(data_dir):
    pipeline = build.build_train(config_for(data_dir), Streams(partner="same"))
    closed = {key.encode() for key in pipeline.split.unlabeled}

    def corrupt(record):
        if record["id"] in closed:
            record["mask"] = b"not an image"
        return record

    edited = _with_records(pipeline, pipeline._config, corrupt)
    chex.assert_trees_all_equal(take_batches(pipeline, 6), take_batches(edited, 6))


@pytest.mark.parametrize("part", ["image", "mask"])
def test_an_undecodable_record_is_named(data_dir, part):
    pipeline = build.build_train(config_for(data_dir), Streams())

    def truncate(record):
        record[part] = record[part][: len(record[part]) // 2]
        return record

    edited = _with_records(pipeline, pipeline._config, truncate)
    with pytest.raises(ValueError, match=r"record 'scene_0\d+': truncated"):
        take_batches(edited, 1)


def test_labels_move_with_their_image(tmp_path):
    """Images that show their own labels, so that every crop can be checked."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(7):
        coarse = rng.integers(0, 4, (5, 7), dtype=np.uint8)
        label = np.kron(coarse, np.ones((8, 8), np.uint8))
        image = np.repeat(label[..., None] * 60 + 20, 3, axis=-1)
        samples.append(
            source.Sample(f"s{i}", decode.encode_png(image), decode.encode_png(label))
        )
    data = source.Source(
        "synthetic",
        tuple("abcd"),
        source.default_palette(("a", "b", "c", "d")),
        RGB,
        {"train": tuple(samples[:6]), "val": tuple(samples[6:])},
    )
    report = check.check_source(data)
    assert not report.problems
    registry.prepare(data, report.present, str(tmp_path))
    config = config_for(tmp_path, split="4", crop=48)
    for geometry in geometries.GEOMETRIES:
        streams = Streams(geometry=geometry, fill="mean")
        for batch in take_batches(build.build_train(config, streams), 4):
            image, label = batch.labeled.image, batch.labeled.label
            shown = np.clip(np.round((image[..., 0] - 20.0) / 60), 0, 3)
            void = 0 if geometry == "u2pl" else 255
            real = np.zeros(label.shape, bool)
            for row, (top, left, bottom, right) in enumerate(batch.labeled.extent):
                real[row, top:bottom, left:right] = True
            assert (label[~real] == void).all()
            assert (label[real] < 4).all()
            agree = (shown == label)[real]
            # All but blurred edges. PyTorch's nearest neighbor, as published, lies up
            # to half a pixel off the interpolated image.
            assert agree.mean() > (0.85 if geometry == "u2pl" else 0.9)


def test_gray_folder_with_unlabeled_images(tmp_path):
    root = make_folder(tmp_path / "src", gray=True, palette_masks=True)
    (root / "unlabeled").mkdir()
    for i in range(3):
        (root / "images" / f"im{i:02d}.png").rename(root / "unlabeled" / f"u{i}.png")
        (root / "masks" / f"im{i:02d}.png").unlink()
    data = registry.read_source("folder", str(root))
    report = check.check_source(data)
    assert not report.problems
    registry.prepare(data, report.present, str(tmp_path / "data"))
    config = config_for(tmp_path / "data", "folder", split="full")
    info = build.dataset_info(config)
    assert info.facts.pixels == GRAY
    assert len(info.present) == 9
    pipeline = build.build_train(config, Streams())
    assert (pipeline.num_labeled, pipeline.num_unlabeled) == (8, 11)
    (batch,) = take_batches(pipeline, 1)
    assert batch.labeled.image.shape == (4, 32, 32, 1)
    assert set(np.unique(batch.labeled.label)) <= {0, 1, 2, 255}
    evaluation = build.build_eval(config)
    assert len(evaluation) == 1
    assert evaluation[0].image.shape == (20, 24, 1)


def test_evaluation_source(data_dir):
    config = config_for(data_dir)
    evaluation = build.build_eval(config)
    assert len(evaluation) == 4
    assert len({evaluation.size(i) for i in range(4)}) == 2
    scenes = {s.id: s for s in synthetic.make_source(13, 4, sizes=SIZES).splits["val"]}
    for i in range(4):
        example = evaluation[i]
        assert example.id == evaluation.ids[i]
        assert example.image.shape == (*evaluation.size(i), 3)
        assert example.label.shape == evaluation.size(i)
        expected = np.asarray(decode.decode_image(scenes[example.id].image, 3))
        np.testing.assert_array_equal(example.image, expected)
    with pytest.raises(ValueError, match=r"without a split 'test'.*train"):
        build.build_eval(config, "test")


def test_ids_and_records_are_in_the_same_order(data_dir):
    info = build.dataset_info(config_for(data_dir))
    for split, ids in info.ids.items():
        stored = [record["id"].decode() for record in info.records(split)]
        assert stored == list(ids)


def test_missing_data_says_how_to_prepare_it(tmp_path):
    command = r"launch\.prepare_data --dataset=synthetic --data_dir="
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=command):
            build.build_train(config_for(folder), Streams())
    with pytest.raises(ValueError, match="unknown data set.*synthetic, folder, camvid"):
        build.build_train(config_for(tmp_path, "imagenet"), Streams())


def test_id_lists_from_the_configuration(data_dir, tmp_path):
    (tmp_path / "l.txt").write_text("scene_00003\nscene_00001")
    config = config_for(data_dir)
    config.data.labeled_ids = str(tmp_path / "l.txt")
    config.data.allow_absent_classes = True
    pipeline = build.build_train(config, Streams())
    assert pipeline.split.labeled == ("scene_00003", "scene_00001")
    assert pipeline.num_unlabeled == 11
    config.data.labeled_ids, config.data.unlabeled_ids = "", str(tmp_path / "l.txt")
    with pytest.raises(ValueError, match="without data.labeled_ids"):
        build.build_train(config, Streams())


def test_no_tensorflow(tmp_path):
    code = f"""
import sys
from tests.support.data_sets import config_for, prepare_synthetic
from mpmc_jax.data import build
from mpmc_jax.types import Streams
prepare_synthetic({str(tmp_path)!r})
iterator = build.build_train(config_for({str(tmp_path)!r}), Streams()).iterator()
next(iterator)
iterator.close()
build.build_eval(config_for({str(tmp_path)!r}))[0]
assert not {{"tensorflow", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
