"""The images that a prediction reads."""

import pathlib
import unicodedata

from mpmc_jax.experiments.predict_inputs import find_images


def test_a_list_reached_through_its_parent_keeps_folders(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "list.txt"
    path.write_text("a/1.png\nb/1.png\n../c/2.png")
    found = find_images([f"{tmp_path}/data/../data/list.txt"])
    assert list(map(str, found.outputs.values())) == ["a/1", "b/1", "2"]


def test_accents_of_a_list_match_those_of_file_names(tmp_path):
    for form, other in (("NFD", "NFD"), ("NFD", "NFC"), ("NFC", "NFD")):
        folder = tmp_path / f"{form}_{other}"
        folder.mkdir()
        stored, written = (
            unicodedata.normalize(each, "caf\u00e9.png") for each in (form, other)
        )
        (folder / stored).touch()
        (folder / "list.txt").write_text(written, encoding="utf-8")
        found = find_images([str(folder / "list.txt")])
        assert all(map(pathlib.Path.is_file, found.outputs))
