"""The programs as a user runs them: train, kill, resume, evaluate, predict, draw."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from mpmc_jax import load_run
from mpmc_jax.models.weights import convert
from tests.support import programs
from tests.support.data_sets import prepare_synthetic
from tests.support.programs import SMALL, run, start

# Its bank, requests and what they ask of the pipeline are part of a run; U2PL's banks
# are in test_compiled_steps.
CONFIG = programs.CONFIG.replace("unimatch", "ael")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set, and a run that was killed once and finished."""
    place = tmp_path_factory.mktemp("runs")
    prepare_synthetic(place / "data", train=13, val=4)
    command = ("launch.train", f"--config={CONFIG}", f"--workdir={place / 'run'}")
    command += (f"--config.data.data_dir={place / 'data'}", *SMALL)
    process = start(*command)
    deadline = time.monotonic() + 900
    while not (place / "run" / "checkpoints" / "2").is_dir():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (place / "output.txt").write_text(run(*command))
    return place


@pytest.mark.full
def test_a_killed_run_goes_on_and_finishes(place):
    assert "resuming from step" in (place / "output.txt").read_text()
    text = (place / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    trained = [x["step"] for x in lines if "train/loss" in x]
    assert trained[-1] == 6 and len(trained) == len(set(trained))
    assert [x["step"] for x in lines if "val/miou" in x][-1] == 6
    assert {"val/patch_map", "val/patch_hamming_constant"} <= set(lines[-1]) | set(
        lines[-2]
    )
    assert any(name.startswith("val/iou/") for name in lines[-1] | lines[-2])
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert {"versions", "device_kind", "seed", "data", "revision"} <= set(manifest)
    assert manifest["data"]["fingerprint"]
    assert len((place / "run" / "splits" / "labeled.txt").read_text().split()) == 4


@pytest.mark.full
def test_a_killed_run_ends_as_one_that_never_stopped(place):
    """The real pipeline, augmentation, network, plug-in and memory: every array."""
    data = f"--config.data.data_dir={place / 'data'}"
    whole = f"--workdir={place / 'whole'}"
    run("launch.train", f"--config={CONFIG}", whole, data, *SMALL)

    def last(name):
        path = place / name / "checkpoints" / "6" / "meta" / "metadata"
        return json.loads(path.read_text())

    assert last("run")["data_state"] == {"next_index": 6}
    assert last("run") == last("whole")


@pytest.mark.full
def test_ctrl_c_before_the_first_step_and_a_finished_run_say_so_in_a_line(place):
    command = ("launch.train", f"--config={CONFIG}", *SMALL)
    command += (f"--config.data.data_dir={place / 'data'}",)
    process = start(*command, f"--workdir={place / 'early'}")
    line = process.stdout.readline()
    assert "4 labeled images" in line and "9 unlabeled; " in line
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGINT
    assert output.splitlines()[-1] == "interrupted", output[-4000:]
    output = run(*command, f"--workdir={place / 'run'}")
    assert output.splitlines()[-1].endswith("finished already: step 6 of 6")


@pytest.mark.full
def test_the_same_workdir_with_other_settings_is_refused(place):
    output = run(
        "launch.train",
        f"--config={CONFIG}",
        f"--workdir={place / 'run'}",
        f"--config.data.data_dir={place / 'data'}",
        *SMALL,
        "--config.seed=1",
        fails=True,
    )
    assert "seed: 0 there, 1 now" in output
    assert "Traceback" not in output


@pytest.mark.full
@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_evaluate_prints_a_table_and_writes_its_figures(place, checkpoint):
    output = run(
        "launch.evaluate", f"--workdir={place / 'run'}", f"--checkpoint={checkpoint}"
    )
    assert "building" in output and "own size" in output
    path = place / "run" / f"eval_val_{checkpoint}.json"
    found = json.loads(path.read_text())
    assert 0 <= found["scalars"]["miou"] <= 1
    assert found["manifest"]["versions"]["jax"]


@pytest.mark.full
def test_a_damaged_checkpoint_is_one_line_and_no_traceback(place):
    shutil.copytree(place / "run", place / "damaged")
    arrays = (place / "damaged" / "checkpoints" / "6" / "state").rglob("d/*")
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    evaluate = ("launch.evaluate", f"--workdir={place / 'damaged'}")
    output = run(*evaluate, "--checkpoint=last", fails=True)
    (line,) = output.splitlines()
    assert re.search(r"checkpoints/6 is damaged: .*--checkpoint=STEP .*\[", line)


@pytest.mark.full
def test_predict_and_draw_figures(place):
    images = place / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("rgb", (40, 50, 3)), ("gray", (33, 41))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            images / f"{name}.png"
        )
    (images / "broken.png").write_bytes(b"no picture")
    output = run(
        "launch.predict",
        f"--workdir={place / 'run'}",
        f"--input={images}",
        f"--output={place / 'predictions'}",
        fails=True,
    )
    assert "broken.png" in output and "2 of 3 images" in output
    names = {path.name for path in (place / "predictions").iterdir()}
    assert {"rgb_index.png", "gray_color.png", "rgb_overlay.png"} <= names
    with Image.open(place / "predictions" / "gray_index.png") as image:
        index = np.asarray(image)
    assert index.shape == (33, 41) and index.max() < 9
    draw = ("launch.experiments", f"--output={place / 'figures'}", place / "run")
    run(*draw, "--name=panels", "--options=images=2")
    with Image.open(place / "figures" / "panels.png") as figure:
        assert figure.width > 4 * 48
    assert (place / "figures" / "panels.svg").exists()
    assert len((place / "figures" / "panels.csv").read_text().splitlines()) == 3
    # A run keeps what predicting needs: its data set may be elsewhere.
    (place / "data").rename(place / "gone")
    run(
        "launch.predict",
        f"--workdir={place / 'run'}",
        f"--input={images / 'gray.png'}",
        f"--output={place / 'again'}",
    )
    (place / "gone").rename(place / "data")
    again = (place / "again" / "gray_color.png").read_bytes()
    assert again == (place / "predictions" / "gray_color.png").read_bytes()
    run(*draw, "--name=pseudo_labels", "--checkpoint=last")
    header, row = (place / "figures" / "pseudo_labels.csv").read_text().splitlines()
    found = dict(zip(header.split(","), row.split(","), strict=True))
    right, wrong = (float(found[f"{kind}_pixels"]) for kind in ("right", "wrong"))
    assert right > 0 and wrong > 0
    # Both are relative to the mean over all pixels.
    lambdas = [float(found[f"lambda_{kind}"]) for kind in ("right", "wrong")]
    mean = (right * lambdas[0] + wrong * lambdas[1]) / (right + wrong)
    assert abs(mean - 1) < 1e-4
    run(*draw, "--name=curves", "--options=copy_runs=1")
    assert "| run |" in (place / "figures" / "table.md").read_text()
    assert (place / "figures" / "curves.png").stat().st_size > 1000
    assert (place / "figures" / "run" / "manifest.json").exists()


@pytest.mark.full
def test_a_run_is_exported_once(place, tmp_path):
    out, program = tmp_path / "out", ("launch.export", f"--workdir={place / 'run'}")
    formats = ("--formats=weights,stablehlo", "--platforms=cpu", "--size=any")
    said = run(*program, f"--output={out}", *formats)
    files = {
        "weights.safetensors",
        "README.md",
        "config.json",
        "classes.json",
        "segment_any.stablehlo",
        "predict_stablehlo.py",
    }
    assert {path.name for path in out.iterdir()} == files
    assert all(f"{out / name}: " in said for name in files)
    scores = re.findall(
        r"\| miou on the validation split \| (0\.\d{4}) \|",
        (out / "README.md").read_text(),
    )
    assert len(scores) == 1
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    np.save(tmp_path / "images.npy", image[None])
    # Without this package.
    code = (
        "import runpy, sys; sys.modules['mpmc_jax'] = None; sys.argv = sys.argv[1:]; "
    )
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    subprocess.run(
        [sys.executable, "-c", code, "predict_stablehlo.py"]
        + [str(tmp_path / "images.npy"), str(tmp_path / "classes.npy")],
        cwd=out,
        check=True,
        env=programs.ENVIRONMENT | {"PYTHONPATH": ""},
    )
    exported = load_run(out / "weights.safetensors")
    np.testing.assert_array_equal(
        np.load(tmp_path / "classes.npy")[0], exported.predict(image)
    )
    for arguments, message in (
        ((f"--output={out}",), "is not empty; name a new folder"),
        (("--output=x", "--size=32"), "give any, or rows x columns as in 512x1024"),
        (("--output=x", "--formats=tflite"), "'tflite' is none of weights, stablehlo"),
        (("--output=x", "--formats=onnx"), "name the sizes of your images"),
    ):
        assert message in run(*program, *arguments, fails=True)


@pytest.mark.full
def test_a_trained_network_goes_out_and_begins_another_run(place):
    path = place / "trained.safetensors"
    last = ("launch.convert_weights", "--checkpoint=last")
    run(*last, f"--input={place / 'run'}", f"--output={path}")
    plain = CONFIG.replace("ael,mpmc=recommended", "supervised")
    command = ("launch.train", f"--config={plain}", *SMALL)
    # The network is AEL's.
    command += ("--config.model.variant=ael", "--config.method.auxiliary_weight=0.4")
    command += (f"--config.data.data_dir={place / 'data'}", "--config.train.steps=1")
    command += (f"--config.model.pretrained={path}", "--config.optimizer.lr=0.0")
    first = f"--workdir={place / 'from'}"
    wrong = run(*command, first, "--config.model.width=16", fails=True)
    assert "width=8, this run has 16" in wrong and "Traceback" not in wrong
    assert not (place / "from").exists()
    assert "the network begins with" in run(*command, first)
    manifest = json.loads((place / "from" / "manifest.json").read_text())
    pretrained = manifest["pretrained"]
    assert pretrained["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert pretrained["source_step"] == "6" and pretrained["fresh"] == []
    # At rate 0 the network is the same again; a finished run needs no weights.
    again = place / "again.safetensors"
    path.rename(place / "moved.safetensors")
    run(*last, f"--input={place / 'from'}", f"--output={again}")
    ours, theirs = (convert.load(x) for x in (again, place / "moved.safetensors"))
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.variables["params"],
        theirs.variables["params"],
    )
    run(*command, first)


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config=configs/synthetic.py:method=unimatsch", "valid: .*'mean_teacher'"),
        ("--config.data.name=coco", "one of synthetic"),
        ("--config.data.data_dir=/nowhere", "launch.prepare_data --dataset=synthetic"),
        ("--config.model.backbone=resnet34", "resnet101"),
        ("--config.model.pretrained=gone.npz", "gone.npz: no such file of weights"),
        (
            "--config.train.bach_size=4",
            "'train.batch_size'\\? valid: train.accumulation",
        ),
        ("--config.trian=4", "'trian'; valid: .*data.crop, .*train.batch_size"),
        ("--config.train.batch_size=3", "train.group_size=2"),
        ("--config=configs/synthetik.py", "there are .*'configs/synthetic.py'"),
    ],
)
def test_mistakes_end_with_one_clear_error(place, change, message):
    arguments = [f"--config={CONFIG}", f"--config.data.data_dir={place / 'data'}"]
    if change.startswith("--config=") or "data_dir" in change:
        arguments = [x for x in arguments if x.split("=")[0] != change.split("=")[0]]
    if "--config=" not in "".join(x[:9] for x in [*arguments, change]):
        arguments.insert(0, f"--config={CONFIG}")
    output = run(
        "launch.train",
        *sorted([*arguments, change], key=lambda x: not x.startswith("--config=")),
        f"--workdir={place / 'other'}",
        fails=True,
    )
    assert re.search(message, output), output[-2000:]
    assert "Traceback" not in output, output[-4000:]
