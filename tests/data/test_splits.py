import numpy as np
import pytest

from mpmc_jax.data import lists, splits

IDS = tuple(f"im{i:02d}" for i in range(40))


def _present(rare_only_in=37):
    """Class 0 everywhere, 1 in every eighth, 2 in a single image."""
    return {
        key: (0, *([1] if i % 8 == 0 else []), *([2] if i == rare_only_in else []))
        for i, key in enumerate(IDS)
    }


@pytest.mark.parametrize("split, count", [("1_16", 3), ("1_2", 20), ("5", 5), ("1", 1)])
def test_drawn_splits_have_the_count_and_every_class(split, count):
    for seed in range(25):
        drawn = splits.draw_split(IDS, _present(), split, seed)
        assert len(drawn.labeled) == count
        assert set(drawn.labeled) | set(drawn.unlabeled) == set(IDS)
        assert not set(drawn.labeled) & set(drawn.unlabeled)
        assert list(drawn.labeled) == sorted(drawn.labeled)
        seen = {label for key in drawn.labeled for label in _present()[key]}
        assert seen >= ({0, 1, 2} if count > 1 else {0, 2})


def test_the_seed_decides():
    draw = [splits.draw_split(IDS, _present(), "1_4", seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(
    "total, split, count",
    [(10582, "1_16", 662), (10582, "1_8", 1323), (10582, "1_4", 2646)]
    + [(2975, "1_16", 186), (2975, "1_8", 372), (2975, "1_4", 744), (2975, "1_2", 1488)]
    + [(7, "full", 7), (7, "3", 3)],
)
def test_counts_are_the_published_ones(total, split, count):
    assert splits.count_labeled(split, total) == count


def test_full_leaves_every_image_unlabeled_too():
    present = _present()
    del present[IDS[3]]
    drawn = splits.draw_split(IDS, present, "full", 0)
    assert drawn.unlabeled == IDS
    assert set(drawn.labeled) == set(IDS) - {IDS[3]}
    # Epochs pair the lists by place, and no image shall always meet itself.
    assert drawn.labeled != tuple(key for key in IDS if key != IDS[3])


def test_images_without_mask_stay_unlabeled():
    present = dict.fromkeys(IDS[:4], (0,))
    drawn = splits.draw_split(IDS, present, "1_2", 0)
    assert len(drawn.labeled) == 2
    assert set(drawn.labeled) < set(IDS[:4])
    assert len(drawn.unlabeled) == 38


@pytest.mark.parametrize("split", ["half", "1_0", "1_2_3", "-4", "", "1/8"])
def test_unreadable_split_lists_what_is_valid(split):
    with pytest.raises(ValueError, match="1_16.*full"):
        splits.count_labeled(split, 10)


def test_impossible_splits():
    with pytest.raises(ValueError, match="no labeled image"):
        splits.draw_split(IDS, _present(), "0", 0)
    with pytest.raises(ValueError, match="asks for 41.*only 40"):
        splits.draw_split(IDS, _present(), "41", 0)
    with pytest.raises(ValueError, match="no training image has a mask"):
        splits.draw_split(IDS, {}, "full", 0)


def test_saved_lists_read_back(tmp_path):
    drawn = splits.draw_split(IDS, _present(), "1_8", 3)
    drawn.save(tmp_path / "run")
    back = splits.read_split(
        IDS,
        _present(),
        str(tmp_path / "run/labeled.txt"),
        str(tmp_path / "run/unlabeled.txt"),
    )
    assert back == drawn


def _write(path, text):
    path.write_text(text)
    return str(path)


def test_both_published_formats(tmp_path):
    pairs = _write(
        tmp_path / "a.txt",
        "JPEGImages/im03.jpg Seg/im03.png\n\nJPEGImages/im01.jpg x.png",
    )
    bare = _write(tmp_path / "b.txt", "im05\r\n  im04  ")
    split = splits.read_split(IDS, _present(), pairs, bare)
    assert split == splits.Split(("im03", "im01"), ("im05", "im04"))
    rest = splits.read_split(IDS, _present(), bare, "")
    assert rest.unlabeled == tuple(k for k in IDS if k not in ("im04", "im05"))


def test_lines_resolve_by_the_longest_path():
    known = {"b/x", "x", "two words", "v1.5"}
    assert lists.resolve("a/b/x.png m.png", known) == "b/x"
    assert lists.resolve("c/x.jpg", known) == "x"
    assert lists.resolve("two words", known) == "two words"
    assert lists.resolve("v1.5", known) == "v1.5"
    assert lists.resolve("y", known) is None


def test_list_errors_name_what_is_wrong(tmp_path):
    good = _write(tmp_path / "good.txt", "im00\nim01\n")
    cases = {
        "name no training image.*zz9.*yy8": "zz9\nim01\nyy8\n",
        "repeats 1 ids: im02": "im02\nim03\nim02\n",
        "empty list, so that no image is labeled": "\n\n",
    }
    for message, text in cases.items():
        with pytest.raises(ValueError, match=message):
            splits.read_split(IDS, _present(), _write(tmp_path / "l.txt", text), good)
    overlap = _write(tmp_path / "o.txt", "im07\nim01\n")
    with pytest.raises(ValueError, match="overlap in 1 ids: im01"):
        splits.read_split(IDS, _present(), good, overlap)
    with pytest.raises(ValueError, match="without mask: im00"):
        splits.read_split(IDS, {"im01": (0,)}, good, "")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        splits.read_split(IDS, _present(), str(tmp_path / "nowhere.txt"), "")
    (tmp_path / "bytes.txt").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match="not a text file"):
        splits.read_split(IDS, _present(), str(tmp_path / "bytes.txt"), "")


def test_lists_of_any_editor(tmp_path):
    path = tmp_path / "val.txt"
    for content in (
        b"\xef\xbb\xbfim0\r\nim1\r\n",
        b"im0\rim1",
        "im0\r\nim1\r\n".encode("utf-16"),
        b"\n  im0  \n\nim1",
    ):
        path.write_bytes(content)
        assert lists.read_lines(path) == ["im0", "im1"]
    # A character at which str.splitlines would split belongs to the name.
    path.write_text("a\x85b\u2028c", encoding="utf-8")
    assert lists.read_lines(path) == ["a\x85b\u2028c"]
    path.write_bytes(b"\xb5\xda1")
    with pytest.raises(ValueError, match=r"val\.txt: not a text file in UTF-8.*save"):
        lists.read_lines(path)


def test_names_match_in_either_form_of_unicode(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for line in (composed, decomposed, f"images/{decomposed}.png m.png"):
        path = _write(tmp_path / "l.txt", line)
        assert splits.read_ids(path, [composed]) == (composed,)
