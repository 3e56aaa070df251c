"""The files that launch.predict reads and writes, and what bad ones do to others."""

import errno
import time

import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from launch import predict as launch_predict
from mpmc_jax.evaluation import prediction_files
from mpmc_jax.evaluation.evaluator import PatchProbe
from mpmc_jax.experiments import predict
from mpmc_jax.experiments import run as runs
from mpmc_jax.pixels import GRAY, RGB, PixelFormat
from mpmc_jax.plugins.base import Identity
from tests.support.bright_run import bright_run

SCENE = PixelFormat(2, (0.5,), (0.5,), "float32", low=(0.0,), high=(1.0,))
VOLUME = PixelFormat(1, (0.0,), (1.0,), "float32", low=(0.0,), high=(1.0,))
GEOREFERENCE = [
    (33550, "d", 3, (0.5, 0.5, 0.0), True),
    (33922, "d", 6, (0.0, 0.0, 0.0, 4e5, 5e6, 0.0), True),
    (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32632), True),
]


class _Tap(Identity):
    """A plug-in whose patches are those of the first layer."""

    taps = ("layer1",)


@pytest.fixture
def make_run(monkeypatch):
    def make(pixels=RGB, **replaced):
        palette = ((9, 9, 9), (250, 0, 0))
        given = {"plugin": _Tap(), **replaced}
        run = bright_run(("a", "b"), palette, pixels, **given)
        run.config.eval.batch_size = 2
        monkeypatch.setattr(runs, "load_run", lambda workdir, checkpoint="best": run)
        return run

    return make


def _predict(*arguments):
    launch_predict.main(["--workdir=run", *map(str, arguments)])


def _image(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def _names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def _expected(run, image):
    scores = run.predictor.probabilities(image)
    return scores.argmax(-1), scores


def test_probabilities_and_entropy(make_run, tmp_path):
    run, image = make_run(), _image((10, 14))
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = "--outputs=index,probabilities,entropy"
    _predict(f"--input={tmp_path / 'a.png'}", f"--output={tmp_path / 'out'}", kinds)
    out = tmp_path / "out"
    assert _names(out) == {"a_index.png", "a_probabilities.npz", "a_entropy.png"}
    classes, scores = _expected(run, image)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a_index.png")), classes)
    with np.load(out / "a_probabilities.npz") as found:
        np.testing.assert_allclose(found["probabilities"], scores, atol=1e-3)
    entropy = -(scores * np.log(scores)).sum(-1) / np.log(2)
    with Image.open(out / "a_entropy.png") as found:
        np.testing.assert_allclose(np.asarray(found), 255 * entropy, atol=0.51)
    # They are this program's: found again, and not read as images.
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}", kinds)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ("index,colour", "'colour' is unknown; valid: index, color"),
        ("patches", "has no patch classifier"),
    ],
)
def test_outputs_that_cannot_be_written(make_run, tmp_path, outputs, said):
    make_run()
    Image.fromarray(_image((8, 8))).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=said):
        _predict(f"--input={tmp_path}", f"--output={tmp_path}", f"--outputs={outputs}")


def test_a_list_names_images_and_their_folders_are_kept(make_run, tmp_path):
    make_run()
    (tmp_path / "data" / "x").mkdir(parents=True)
    for name in ("data/a.png", "data/x/a.png", "b.png"):
        Image.fromarray(_image((8, 8))).save(tmp_path / name)
    lines = ["a.png", "x/a.png", "", str(tmp_path / "b.png"), "absent.png"]
    (tmp_path / "data" / "list.txt").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as stopped:
        _predict(
            f"--input={tmp_path / 'data' / 'list.txt'}",
            f"--output={tmp_path / 'out'}",
            "--outputs=color",
        )
    assert str(stopped.value.code).endswith("absent.png: no file")
    wanted = {"a_color.png", "x/a_color.png", "b_color.png"}
    assert _names(tmp_path / "out") == wanted


def test_images_of_many_sizes_equal_single_predictions(make_run, tmp_path):
    run = make_run()
    sizes = [(9, 12), (7, 12), (9, 12), (9, 12), (300, 12), (7, 12)]
    for seed, size in enumerate(sizes):
        Image.fromarray(_image(size, seed)).save(tmp_path / f"{seed}.png")
    (tmp_path / "4b.png").write_bytes((tmp_path / "0.png").read_bytes()[:80])
    arguments = (f"--input={tmp_path}", "--outputs=index", "--window_above=2000")
    with pytest.raises(SystemExit, match=r"4b\.png"):
        _predict(*arguments, f"--output={tmp_path / 'out'}")
    for seed, size in enumerate(sizes):
        found = Image.open(tmp_path / "out" / f"{seed}_index.png")
        expected = _expected(run, _image(size, seed))[0]
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_rare_sizes_share_the_windows_of_a_sliding_protocol(make_run, tmp_path):
    run = make_run()
    run.config.eval.protocol, run.config.data.crop = "slide_u2pl", 8
    sizes = [(9, 12)] * 8 + [(11, 13), (20, 9)]
    for seed, size in enumerate(sizes):
        Image.fromarray(_image(size, seed)).save(tmp_path / f"{seed}.png")
    writer = predict.PredictionWriter(run, tmp_path, overwrite=False)
    images = [predict._Image(None, size, {}, None) for size in sizes]
    windowed, whole = writer._divide(images)
    assert [image.size for image in windowed] == sizes[8:] and len(whole) == 8
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
    for seed, size in enumerate(sizes):
        found = np.asarray(Image.open(tmp_path / "out" / f"{seed}_index.png"))
        np.testing.assert_array_equal(found, _expected(run, _image(size, seed))[0])


def test_padding_shares_a_program_and_is_cut_off(make_run, tmp_path):
    run = make_run()
    for seed, size in enumerate([(9, 12), (7, 15)]):
        Image.fromarray(_image(size, seed)).save(tmp_path / f"{seed}.png")
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--pad_to=16")
    for seed, size in enumerate([(9, 12), (7, 15)]):
        found = np.asarray(Image.open(tmp_path / "out" / f"{seed}_index.png"))
        # The toy network sees single pixels: padding changes nothing.
        np.testing.assert_array_equal(found, _expected(run, _image(size, seed))[0])


def test_a_large_image_is_written_band_by_band(make_run, tmp_path):
    run, image = make_run(), _image((1100, 40))
    Image.fromarray(image).save(tmp_path / "a.png")
    outputs = "--outputs=index,color,overlay,probabilities,entropy"
    out = tmp_path / "out"
    _predict(f"--input={tmp_path}", f"--output={out}", outputs, "--window_above=99")
    classes, scores = _expected(run, image)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a_index.png")), classes)
    with np.load(out / "a_probabilities.npz") as found:
        np.testing.assert_allclose(found["probabilities"], scores, atol=1e-3)


def test_a_georeference_is_kept(make_run, tmp_path):
    run = make_run(SCENE)
    scene = np.random.default_rng(0).random((12, 15, 2), np.float32)
    options = {"planarconfig": "contig", "extratags": GEOREFERENCE}
    tifffile.imwrite(tmp_path / "a.tif", scene, photometric="minisblack", **options)
    out = tmp_path / "out"
    outputs = "--outputs=index,color,probabilities"
    _predict(f"--input={tmp_path}", f"--output={out}", outputs)
    assert _names(out) == {"a_index.tif", "a_color.png", "a_probabilities.tif"}
    classes, scores = _expected(run, scene)
    for name, expected in (("index", classes), ("probabilities", scores)):
        with tifffile.TiffFile(out / f"a_{name}.tif") as found:
            np.testing.assert_allclose(found.asarray(), expected, atol=1e-6)
            tags = found.pages.first.tags
            for code, _, _, value, _ in GEOREFERENCE:
                assert tags[code].value == value
    first = {path: path.read_bytes() for path in out.iterdir()}
    _predict(f"--input={tmp_path}", f"--output={out}", outputs, "--overwrite")
    assert first == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_nifti_volume_is_predicted_on_its_grid(
    make_run, tmp_path, ending, capsys, caplog
):
    run = make_run(VOLUME)
    values = np.random.default_rng(0).integers(-50, 900, (9, 11, 5)).astype(np.int16)
    affine = np.diag([1.5, 1.5, 8, 1.0])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / f"a{ending}")
    out = tmp_path / "out"
    _predict(f"--input={tmp_path}", f"--output={out}", "--outputs=index,color")
    slices = {f"a/{i + 1:04d}_color.png" for i in range(5)}
    assert _names(out) == slices | {"a_index.nii.gz"}
    found = nibabel.load(out / "a_index.nii.gz")
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.affine, affine)
    unit = ((values.T - values.min()) / np.ptp(values)).astype(np.float32)
    expected = [_expected(run, each[..., None])[0] for each in unit]
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.transpose(expected))
    assert "1 of 1 image written" in capsys.readouterr().out
    # The run is not one on ACDC.
    assert caplog.text.count("volumes are scaled from their smallest") == 1
    _predict(f"--input={tmp_path}", f"--output={out}", "--outputs=index,color")
    assert f"0 of 1 image written to {out}, 1 already" in capsys.readouterr().out


def test_pages_of_a_tiff_are_images_unless_they_are_channels(make_run, tmp_path):
    run = make_run()
    pages = [_image((8, 10), seed) for seed in range(3)]
    tifffile.imwrite(tmp_path / "a.tif", np.stack(pages), photometric="rgb")
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--outputs=index")
    for number, page in enumerate(pages, 1):
        found = Image.open(tmp_path / "out" / "a" / f"{number:04d}_index.png")
        np.testing.assert_array_equal(np.asarray(found), _expected(run, page)[0])
    run = make_run(SCENE)
    scene = np.random.default_rng(0).random((2, 12, 15), np.float32)
    tifffile.imwrite(tmp_path / "b.tif", scene, photometric="minisblack")
    _predict(f"--input={tmp_path / 'b.tif'}", f"--output={tmp_path / 'scene'}")
    assert "b_index.png" in _names(tmp_path / "scene")


def test_a_stack_has_its_full_pages_alone(make_run, tmp_path):
    """Each page has a smaller copy and a mask behind it."""
    run = make_run()
    pages = [_image((64, 80), seed) for seed in range(2)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb", contiguous=False)
            file.write(page[::2, ::2], photometric="rgb", subfiletype=1)
            file.write(page[..., 0] > 99, photometric="mask", subfiletype=4)
    out = tmp_path / "out"
    _predict(f"--input={tmp_path}", f"--output={out}", "--outputs=index")
    assert _names(out) == {"a/0001_index.png", "a/0002_index.png"}
    for number, page in enumerate(pages, 1):
        found = Image.open(out / "a" / f"{number:04d}_index.png")
        np.testing.assert_array_equal(np.asarray(found), _expected(run, page)[0])


def test_a_full_disk_ends_predict_within_a_stack(make_run, tmp_path, monkeypatch):
    """The files behind it are left alone, as after an image."""
    make_run()
    pages = np.stack([_image((8, 10), seed) for seed in range(2)])
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", pages, photometric="rgb")
    tried = []

    def write_bytes(path, content):
        tried.append(path.parent.name)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(prediction_files, "write_bytes", write_bytes)
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
    (line,) = str(stopped.value.code).splitlines()
    assert "0001_index.png: No space left on device; 0 images written" in line
    assert set(tried) == {"a"}


def test_a_stack_with_pages_of_two_sizes_is_named(make_run, tmp_path):
    make_run()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for size in ((8, 10), (8, 10), (9, 10)):
            file.write(_image(size), photometric="rgb", contiguous=False)
    with pytest.raises(SystemExit, match="page 3 has another size than the first"):
        _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")


def test_few_images_are_read_ahead(make_run, tmp_path, monkeypatch):
    """However many share a batch; here each batch has 8 images, on four devices."""
    make_run()
    for seed in range(24):
        Image.fromarray(_image((8, 10), seed)).save(tmp_path / f"{seed}.png")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    read, decode_array, seen = [], predict.decode_array, []

    def decode(content, pixels):
        read.append(len(content))
        return decode_array(content, pixels)

    def predict_batch(self, batch, stored):
        assert len(batch.images) == 8
        time.sleep(0.2)  # for what is read meanwhile
        seen.append(len(read))
        return whole(self, batch, stored)

    whole = predict.PredictionWriter._predict_batch
    monkeypatch.setattr(predict, "decode_array", decode)
    monkeypatch.setattr(predict.PredictionWriter, "_predict_batch", predict_batch)
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
    assert len(seen) == 3 and seen[0] <= 8 + 2
    assert len(_names(tmp_path / "out")) == 3 * 24


def test_smaller_copies_in_a_tiff_are_no_images(make_run, tmp_path):
    """A cloud-optimized GeoTIFF has its overviews as further pages."""
    run, image = make_run(), _image((64, 80))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(image, photometric="rgb", tile=(32, 32), extratags=GEOREFERENCE)
        file.write(image[::2, ::2], photometric="rgb", subfiletype=1)
    _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}", "--outputs=index")
    found = tifffile.imread(tmp_path / "out" / "a_index.tif")
    np.testing.assert_array_equal(found, _expected(run, image)[0])


def test_a_damaged_volume_does_not_end_the_others(make_run, tmp_path):
    make_run(GRAY)
    (tmp_path / "a.nii.gz").write_bytes(b"no volume")
    (tmp_path / "b.nii").write_bytes(b"\0" * 400)
    Image.fromarray(_image((8, 8))).save(tmp_path / "c.png")
    with pytest.raises(SystemExit) as stopped:
        _predict(f"--input={tmp_path}", f"--output={tmp_path / 'out'}")
    lines = str(stopped.value.code).splitlines()
    assert len(lines) == 2 and "a.nii.gz: " in lines[0] and "b.nii: " in lines[1]
    assert "c_index.png" in _names(tmp_path / "out")


def test_patches_state_classes_and_the_pixels_that_they_cover(make_run, tmp_path):
    def apply(variables, images, labels):
        logits = jnp.stack([images[:, ::4, ::4, 0], -images[:, ::4, ::4, 0]], -1)
        return logits, logits > 0, logits[..., 0] > -99

    make_run(probe=PatchProbe({}, apply))
    image = _image((40, 44))
    Image.fromarray(image).save(tmp_path / "a.png")
    out = tmp_path / "out"
    _predict(f"--input={tmp_path}", f"--output={out}", "--outputs=patches")
    with np.load(out / "a_patches.npz") as found:
        assert found["probabilities"].shape == (10, 11, 2)
        np.testing.assert_allclose(found["probabilities"].sum(-1), 1, atol=2e-3)
        assert found["rows"].shape == (10, 2) and found["columns"].shape == (11, 2)
        assert found["rows"].min() == 0 and found["columns"].max() == 44
    with pytest.raises(SystemExit, match="leave patches out of --outputs"):
        _predict(
            f"--input={tmp_path / 'a.png'}",
            f"--output={tmp_path / 'large'}",
            "--outputs=patches",
            "--window_above=99",
        )


def test_batches_are_as_large_as_one_image_may_be(make_run):
    run = make_run()
    writer = predict.PredictionWriter(run, None, overwrite=False)
    images = [predict._Image(None, (1500, 1500), {}, None)] * 3
    assert {len(batch.images) for batch in writer._batches(images)} == {3}
    assert {batch.rows for batch in writer._batches(images)} == {3}
