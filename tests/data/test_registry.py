"""The registry of data sets: a further data set is one function and one entry."""

import numpy as np
import pytest

from launch import check_data, prepare_data
from mpmc_jax.data import build, registry
from mpmc_jax.data.source import Sample, Source
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for, write_image


def _read_toy(directory):
    """Describes a folder of NAME.png and NAME_mask.png; the last one is for "val"."""
    paths = sorted(directory.glob("*[!k].png"))
    samples = tuple(
        Sample(path.stem, path, path.with_stem(f"{path.stem}_mask")) for path in paths
    )
    return Source(
        name="toy",
        class_names=("dark", "light"),
        palette=((0, 0, 0), (255, 255, 255)),
        pixels=RGB,
        splits={"train": samples[:-1], "val": samples[-1:]},
    )


@pytest.fixture
def toy_source(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.DATASETS, "toy", registry.Dataset(_read_toy))
    rng = np.random.default_rng(0)
    for i in range(7):
        image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        label = (image.mean(axis=-1) > 127).astype(np.uint8)
        write_image(tmp_path / "src" / f"im{i}.png", image)
        write_image(tmp_path / "src" / f"im{i}_mask.png", label)
    return tmp_path / "src"


def test_one_entry_adds_a_data_set(toy_source, tmp_path, capsys):
    named = ["--dataset=toy", f"--source={toy_source}"]
    data_dir = f"--data_dir={tmp_path / 'data'}"
    prepare_data.main([*named, data_dir])
    assert "toy/train: 6 images, 6 with mask" in capsys.readouterr().out
    prepare_data.main([*named, data_dir])
    assert "has not changed" in capsys.readouterr().out
    check_data.main(["--dataset=toy", data_dir])
    assert "No problem found." in capsys.readouterr().out

    config = config_for(tmp_path / "data", "toy", batch_size=2, split="2", crop=16)
    split = build.build_split(config, build.dataset_info(config))
    assert len(split.labeled) == 2 and len(split.unlabeled) == 4
    iterator = build.build_train(config, Streams(partner="same")).iterator()
    batch = next(iterator)
    iterator.close()
    assert batch.labeled.image.shape == batch.partner.image.shape == (2, 16, 16, 3)
    (example,) = build.build_eval(config)
    assert example.id == "im6" and set(np.unique(example.label)) == {0, 1}


def test_class_names_are_for_data_sets_that_take_them(toy_source):
    with pytest.raises(ValueError, match=r"--classes=a,b: toy has.*--dataset=folder"):
        registry.read_source("toy", str(toy_source), ("a", "b"))


def test_a_generated_data_set_has_no_source_folder(tmp_path):
    with pytest.raises(ValueError, match=r"synthetic is generated.*leave --source out"):
        registry.read_source("synthetic", str(tmp_path))
