"""Planted faults of labels: each is named with its file and what to do."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from launch import check_data
from mpmc_jax.data import check, registry
from mpmc_jax.data.doctor import diagnose, edges
from mpmc_jax.data.doctor.evidence import examine, picture_hash
from mpmc_jax.experiments import label_check
from tests.support.data_sets import real

HEIGHT, WIDTH = 96, 120
IMAGES = 16
COLORS = np.array([(0, 0, 0), (200, 30, 30), (30, 200, 30)], np.uint8)


def _scene(seed, classes=3):
    """An image of rectangles on a smooth background, and its labels."""
    rng = np.random.default_rng(seed)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    coarse = rng.integers(0, 90, (4, 5, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((WIDTH, HEIGHT)), np.int16)
    for i in range(6):
        value = 1 + i % (classes - 1)
        top, left = rng.integers(4, HEIGHT - 30), rng.integers(4, WIDTH - 40)
        part = np.s_[top : top + rng.integers(8, 26), left : left + rng.integers(8, 36)]
        label[part] = value
        image[part] = rng.integers(120, 250, 3)
    image += rng.integers(-6, 7, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), label


def _write(root, classes=3):
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(IMAGES):
        image, label = _scene(i, classes)
        Image.fromarray(image).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(label).save(root / "masks" / f"{i:02d}.png")
    names = ["ground", "house", "tree"][:classes]
    (root / "classes.json").write_text(json.dumps({"classes": names}))
    (root / "val.txt").write_text("\n".join(f"{i:02d}" for i in range(12, IMAGES)))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean") / "set"
    _write(root)
    return root


@pytest.fixture
def root(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "set")


def _lines(root):
    """Every problem, warning and finding, without notes on the held-out images."""
    source = registry.read_source("folder", str(root))
    report = check.check_source(source, examine)
    findings = diagnose.diagnose(source, report.evidence)
    lines = [*report.problems, *report.warnings, *report.notes]
    return [*lines, *(finding.text for finding in findings)]


def _mask(root, key="03"):
    return root / "masks" / f"{key}.png"


def _change(root, change, keys=("03",)):
    for key in keys:
        path = _mask(root, key)
        Image.fromarray(change(np.array(Image.open(path)))).save(path)


ALL = tuple(f"{i:02d}" for i in range(IMAGES))


def _no_mask(root):
    _mask(root).rename(root / "masks" / "o3.png")


def _another_size(root):
    path = _mask(root)
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2), 0).save(path)


def _wrong_color_count(root):
    _change(root, lambda label: COLORS[label])


def _with_palette(root):
    _change(root, lambda label: COLORS[label], ALL)
    facts = {"classes": ["ground", "house", "tree"], "palette": COLORS.tolist()}
    (root / "classes.json").write_text(json.dumps(facts))


def _anti_aliased(root):
    _with_palette(root)
    path = _mask(root)
    small = Image.open(path).resize(
        (WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR
    )
    small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)


def _photo_as_mask(root):
    _with_palette(root)
    shutil.copy(root / "images" / "03.png", _mask(root))


def _blended(root):
    def change(label):
        wide = Image.fromarray(label).resize((WIDTH * 2, HEIGHT * 2), 0)
        wide = wide.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        return np.array(wide.filter(ImageFilter.BoxBlur(1)))

    # Class 1 between ground and trees.
    _change(root, lambda label: np.where(label == 1, 2, label).astype(np.uint8))
    _change(root, change)


def _lossy(root):
    label = np.array(Image.open(_mask(root)))
    _mask(root).unlink()
    Image.fromarray(label).save(root / "masks" / "03.jpg")


def _same_mask(root):
    shutil.copy(_mask(root, "02"), _mask(root))


def _exchanged(root):
    first = _mask(root, "02").read_bytes()
    _mask(root, "02").write_bytes(_mask(root).read_bytes())
    _mask(root).write_bytes(first)


def _shifted(root):
    _change(root, lambda label: np.roll(label, 1, axis=1), ALL)


def _noise(root):
    def change(label):
        at = np.random.default_rng(0).random(label.shape) < 0.02
        return np.where(at, 1, label).astype(np.uint8)

    _change(root, change)


def _leak(root):
    image = np.array(Image.open(root / "images" / "13.png"))
    brighter = np.clip(image * 1.05 + 3, 0, 255).astype(np.uint8)
    path = root / "images" / "03.png"
    path.unlink()
    Image.fromarray(brighter).save(path.with_suffix(".jpg"), quality=85)
    shutil.copy(_mask(root, "13"), _mask(root))


def _two_labels(root):
    shutil.copy(root / "images" / "02.png", root / "images" / "03.png")


def _blank(root):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images" / "03.png")


def _truncated(root):
    _mask(root).write_bytes(_mask(root).read_bytes()[:60])


def _class_of_few_pixels(root):
    def change(label):
        label = np.where(label == 2, 0, label)
        label[:2, :2] = 2
        return label

    _change(root, lambda label: np.where(label == 2, 0, label).astype(np.uint8), ALL)
    _change(root, change)


FAULTS = {
    "no mask": (_no_mask, "03.png; images without masks belong in unlabeled/"),
    "another size": (_another_size, "resize the mask with nearest neighbor"),
    "turned": (lambda r: _change(r, np.rot90), "turned by 90 degrees: turn it back"),
    "no such class": (
        lambda r: _change(r, lambda label: label + np.uint8(2)),
        "are not below the class count 3; store class indices",
    ),
    "color": (_wrong_color_count, "give the palette, or store class indices"),
    "anti-aliased": (_anti_aliased, "export it without, and resize masks with nearest"),
    "photo": (_photo_as_mask, "is it a photo, no mask?"),
    "interpolated": (_blended, "resize masks with nearest neighbor"),
    "lossy": (_lossy, "store masks as PNG"),
    "truncated": (_truncated, "copy it again"),
    "empty": (
        lambda r: _change(r, np.zeros_like),
        "if something is not labeled there, label it, or move the image to unlabeled/",
    ),
    "void": (
        lambda r: _change(
            r, lambda x: np.where(np.arange(120) < 4, x, 255).astype("u1")
        ),
        "more than 95% void; label more of it",
    ),
    "same mask": (_same_mask, "Export each image's own mask"),
    "exchanged": (_exchanged, "each fits the other's image better; exchange the two"),
    "all shifted": (_shifted, "better when moved 1 pixel left"),
    "mirrored": (lambda r: _change(r, np.fliplr), "was mirrored left to right"),
    "upside down": (lambda r: _change(r, np.flipud), "was mirrored top to bottom"),
    "one shifted": (
        lambda r: _change(r, lambda label: np.roll(label, 8, axis=0)),
        "labels lie too low on the image",
    ),
    "noise": (_noise, "Export it as PNG, without dithering"),
    "leak": (_leak, "this makes results too good: remove them from one split"),
    "two labels": (_two_labels, "different labels of equal images; keep the right"),
    "blank": (_blank, "all pixels are equal; remove the image and its mask"),
    "few pixels": (_class_of_few_pixels, "in 1 image (03); if it is a stray value"),
    "absent": (
        lambda r: _change(r, lambda x: np.where(x == 2, 0, x).astype(np.uint8), ALL),
        "no training mask holds tree; launch.train refuses that: label them",
    ),
}


def test_correct_labels_raise_no_alarm(root):
    assert _lines(root) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, root):
    plant, mend = FAULTS[fault]
    plant(root)
    lines = [line for line in _lines(root) if mend in line]
    assert len(lines) == 1, _lines(root)
    assert fault == "absent" or "03" in lines[0]


def test_inverted_masks(tmp_path):
    _write(tmp_path / "set", classes=2)
    assert _lines(tmp_path / "set") == []
    _change(tmp_path / "set", lambda label: 1 - label)
    (line,) = _lines(tmp_path / "set")
    assert "03.png: house surrounds ground, unlike in the other masks" in line
    assert "exchange the two values" in line


def test_values_between_0_and_255(tmp_path):
    root = tmp_path / "set"
    _write(root, classes=2)
    _change(root, lambda label: label * np.uint8(255), ALL)
    facts = {"classes": ["ground", "house"], "binary": True}
    (root / "classes.json").write_text(json.dumps(facts))
    path = _mask(root)
    small = Image.open(path).resize(
        (WIDTH // 2, HEIGHT // 2), Image.Resampling.BILINEAR
    )
    small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)
    (line, *_) = _lines(root)
    assert "03.png: holds" in line and "drawn with anti-aliasing or resized" in line


class _FakeRun:
    """A run that predicts the labels of a scene, with one wrong corner."""

    def __init__(self, facts, change=lambda label: label):
        self.facts, self.change = facts, change
        self.predictor = self

    def probabilities(self, image):
        seeds = [i for i in range(IMAGES) if (_scene(i)[0] == image).all()]
        label = _scene(seeds[0])[1].copy()
        label[:4, :4] = 1
        label = self.change(label)
        return 0.98 * np.eye(3)[label] + 0.01


@dataclasses.dataclass
class _Facts:
    class_names: tuple
    pixels: object


def test_labels_that_a_run_contradicts(root):
    _change(root, lambda label: np.where(label == 2, 1, label).astype(np.uint8))
    source = registry.read_source("folder", str(root))
    run = _FakeRun(_Facts(source.class_names, source.pixels))
    (finding,) = label_check.find_disagreements(run, source)
    assert finding.ids == ("03",)
    assert "03.png: a run with mIoU 9" in finding.text
    assert finding.text.endswith("(tree instead of house); compare the two")
    # Of almost all pixels it is not sure.
    sure = run.probabilities
    rest = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1) > 8
    run.probabilities = lambda image: np.where(rest, 0.9 * sure(image), sure(image))
    assert label_check.find_disagreements(run, source) == []
    run.facts.class_names = ("a", "b")
    with pytest.raises(ValueError, match="trained on the classes a, b, and the data"):
        label_check.find_disagreements(run, source)


def test_a_run_does_not_judge_classes_that_it_has_not_learned(root):
    """It takes all trees for houses; one mask has houses for ground too."""
    _change(root, lambda label: np.where(label == 0, 1, label).astype(np.uint8))
    source = registry.read_source("folder", str(root))
    facts = _Facts(source.class_names, source.pixels)
    run = _FakeRun(facts, lambda label: np.where(label == 2, 1, label))
    warning, note = label_check.find_disagreements(run, source)
    assert warning.ids == ("03",) and "(ground instead of house)" in warning.text
    assert note.level == "note" and note.text.startswith("labels of tree (0.0%) are")
    # A run that has learned nothing says nothing of any class but the first.
    run = _FakeRun(facts, np.zeros_like)
    findings = label_check.find_disagreements(run, source)
    assert [each.level for each in findings] == ["note"]


def test_a_page_without_any_other_file(root, tmp_path, capsys):
    _exchanged(root)
    (root / "masks" / "05.png").write_text("x")
    page = tmp_path / "page.html"
    command = ["--dataset=folder", f"--source={root}", f"--html={page}"]
    with pytest.raises(SystemExit, match="1 problem"):
        check_data.main(command)
    assert "warning: " in capsys.readouterr().out
    text = page.read_text()
    assert "Problems (1)" in text and "05.png: not a PNG" in text
    assert "Warnings (1)" in text and "exchange the two files" in text
    assert text.count("data:image/jpeg;base64,") >= 4
    assert "prefers-color-scheme: dark" in text
    for outside in ("http", 'src="/', "<script", "<link"):
        assert outside not in text
    with pytest.raises(SystemExit, match="is a folder; name a file in it"):
        check_data.main([*command[:2], f"--html={tmp_path}"])
    with pytest.raises(SystemExit, match="--html: is for --source"):
        check_data.main(["--dataset=folder", "--data_dir=x", "--html=y"])


def test_a_page_shows_images_with_problems(root, tmp_path):
    facts = {"classes": ["ground", "house", "tree"], "palette": COLORS.tolist()}
    (root / "classes.json").write_text(json.dumps(facts))
    _change(root, lambda label: COLORS[label], [f"{i:02d}" for i in range(IMAGES)])
    stray = np.array(Image.open(_mask(root, "05")))
    stray[7, 20:23] = 9, 8, 7
    Image.fromarray(stray).save(_mask(root, "05"))
    _change(root, lambda colors: colors[:-2], ["06"])
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as failed:
        check_data.main(["--dataset=folder", f"--source={root}", f"--html={page}"])
    text = (
        "05.png: holds 1 color that the palette lacks: (9, 8, 7); if these 3 pixels, "
        "the first in row 7 and column 20 (from 0), are a slip, repaint them; "
        "otherwise: add them to the palette, or list them under void"
    )
    assert text in str(failed.value)
    problems, examples = page.read_text().split("<h2>Examples</h2>")
    assert text in problems
    for key in ("05", "06"):
        assert f"{key} and its labels" in problems
        assert f"{key} and its labels" not in examples


def test_a_value_in_few_pixels_is_located(root):
    def change(label):
        label[3, 4] = 9
        return label

    _change(root, change)
    (line, *_) = _lines(root)
    assert (
        "values 9 are not below the class count 3; if this pixel, in row 3 and column "
        "4 (from 0), is a slip, repaint it; otherwise: store class indices 0..2" in line
    )


def test_a_page_of_many_problems_shows_the_first(root, tmp_path):
    def change(label):
        label[3, 4] = 9
        return label

    _change(root, change, ALL)
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit, match="16 problems"):
        check_data.main(["--dataset=folder", f"--source={root}", f"--html={page}"])
    problems, _ = page.read_text().split("<h2>Classes</h2>")
    assert problems.count("values 9 are not") == 16
    assert problems.count("data:image/jpeg;base64,") == 12


def test_the_hash_of_a_picture():
    image, _ = _scene(0)
    other, _ = _scene(1)
    half = np.array(Image.fromarray(image).resize((WIDTH // 2, HEIGHT // 2)))
    near = (picture_hash(image) != picture_hash(half)).sum()
    far = (picture_hash(image) != picture_hash(other)).sum()
    assert near < 24 < 70 < far


def test_the_contrast_of_a_mask():
    image, label = _scene(0)
    found = edges.fit(image, label)
    assert found.own.mean > 2 * edges.contrast(edges.steps(image), label[::-1]).mean
    assert np.unravel_index(found.profile.argmax(), found.profile.shape) == (3, 3)
    moved = edges.fit(image, np.roll(label, 2, axis=1))
    assert np.unravel_index(moved.profile.argmax(), moved.profile.shape) == (3, 1)
    empty = edges.fit(image, np.zeros_like(label))
    assert empty.own.count == 0 and not empty.change and not empty.profile.any()


def test_images_of_extreme_values():
    _, label = _scene(0)
    image = np.full((HEIGHT, WIDTH, 2), -3.4e38, np.float32)
    image[: HEIGHT // 2] = np.nan
    image[:4] = np.inf
    found = examine(image, label, "")
    assert found.fit is not None and np.isfinite(found.fit.profile).all()
    for size in ((1, 1), (9, 3000), (3000, 1)):
        black = np.zeros((*size, 1), np.uint8)
        assert examine(black, black[..., 0], "").blank


@pytest.mark.full
@pytest.mark.parametrize(
    "name, folder, alarms",
    [
        ("camvid", "camvid", []),
        ("voc", "voc_sample", []),
        # Patients 74 and 76 are the same images, whose labels differ.
        ("acdc", "acdc", ["different labels of equal images, and so in 15 more cases"]),
    ],
)
def test_no_false_alarm_on_real_data(name, folder, alarms):
    source = registry.read_source(name, str(real(folder)))
    report = check.check_source(source, examine)
    findings = diagnose.diagnose(source, report.evidence)
    texts = [each.text for each in findings if each.level == "warning"]
    assert len(texts) == len(alarms)
    assert all(alarm in text for alarm, text in zip(alarms, texts, strict=True))
    assert report.problems == () and report.warnings == ()
