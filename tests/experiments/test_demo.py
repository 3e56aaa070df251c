"""The demonstration page: its answers, and the page itself where a browser is there."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mpmc_jax.evaluation.evaluator import PatchProbe
from mpmc_jax.experiments import demo_page
from mpmc_jax.experiments.demo import Demo
from mpmc_jax.plugins.base import Identity
from tests.support.bright_run import bright_run
from tests.support.browser import serious_violations


class _Patches(Identity):
    """Weighs pixels by their class."""

    taps = ("layer1",)

    def weigh_pixels(self, logits, labels):
        return 0.25 + 0.5 * labels


def _apply(variables, images, labels):
    value = images[:, ::4, ::4, 0]
    logits = jnp.stack([-value, value], -1)
    return logits, logits > 0, value > -99


@pytest.fixture
def run():
    return bright_run(
        ("dark", "<bright>"),
        ((9, 9, 9), (250, 0, 0)),
        plugin=_Patches(),
        probe=PatchProbe({}, _apply),
    )


@pytest.fixture
def image(tmp_path):
    bright = np.zeros((40, 60), bool)
    bright[:, :15] = True
    path = tmp_path / "scene.png"
    pixels = np.where(bright, 250, 5)[..., None].repeat(3, -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_an_answer_has_picture_legend_maps_and_files(run, image, tmp_path):
    answer = Demo(run, tmp_path / "out")(str(image))
    assert "scene.png: 60 x 40 pixels, mean confidence" in answer.message
    assert answer.picture.count("<img") == 2
    assert "&lt;bright&gt;" in answer.legend and "<bright>" not in answer.legend
    assert re.findall(r"<td>([\d.]+)</td>", answer.legend)[::3] == ["75.0", "25.0"]
    for name in ("confidence", "lambda_s: black 0.25, white 0.75", "dark in patches"):
        assert name in answer.maps
    kinds = {path.name for path in answer.files}
    assert kinds == {f"scene_{x}.png" for x in ("index", "color", "overlay", "entropy")}
    assert all(path.is_file() for path in answer.files)


def test_the_files_of_the_answer_before_are_removed(run, image, tmp_path):
    demo = Demo(run, tmp_path / "out")
    (first, *_), (second, *_) = (demo(str(image)).files for _ in range(2))
    assert not first.exists() and second.exists()


def test_a_run_without_a_patch_classifier_and_large_images(run, image, tmp_path):
    answer = Demo(dataclasses.replace(run, probe=None), tmp_path / "out")(str(image))
    assert "confidence" in answer.maps and "patches" not in answer.maps
    run.predictor.window_above = 99
    answer = Demo(run, tmp_path / "out")(str(image))
    assert "predicted in windows" in answer.message
    assert "confidence" in answer.maps and "patches" not in answer.maps


def test_wrong_and_large_files_give_a_message(run, image, tmp_path):
    wrong = tmp_path / "<b>.png"
    wrong.write_bytes(b"no image")
    demo = Demo(run, tmp_path / "out")
    said = demo(str(wrong)).message
    assert 'role="alert"' in said and "&lt;b&gt;.png was not predicted" in said
    assert demo(str(tmp_path / "absent.png")).message.startswith("<p role")
    assert demo(None).message == "" and demo(str(wrong)).files == ()
    small = Demo(run, tmp_path / "out", max_pixels=2000)
    assert "60 x 40 pixels are more than 2000" in small(str(image)).message
    small = Demo(run, tmp_path / "out", max_bytes=10)
    assert "larger than" in small(str(image)).message


def test_without_gradio_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[demo\]'"):
        demo_page.load_gradio()


@pytest.fixture
def served(run, tmp_path):
    """The address of the page."""
    pytest.importorskip("gradio")
    gradio = demo_page.load_gradio()
    demo = Demo(run, tmp_path / "out" / "results")
    page = demo_page.make_page(gradio, demo, "a <run>", "png")
    options = {"port": 0, "max_bytes": 10**6, "block": False}
    yield demo_page.show(gradio, page, tmp_path / "out", **options)
    page.close()


def _choose(view, url, file):
    """Opens the page and chooses a file."""
    view.goto(url)
    chosen = view.locator("#file input[type=file]")
    chosen.wait_for(state="attached", timeout=60_000)
    chosen.set_input_files(file)
    view.locator("#picture img.colors").wait_for(timeout=60_000)
    return chosen


_OF_GRADIO = pytest.mark.filterwarnings("default")


@_OF_GRADIO
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(image, tmp_path, browser, served, width):
    assert served.startswith("http://127.0.0.1:")
    hosts, view = set(), browser.new_page(viewport={"width": width, "height": 900})
    view.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    chosen = _choose(view, served, image)
    assert view.locator("#legend").inner_text().count("<bright>") == 1
    assert view.locator("#maps figure").count() == 4
    assert view.locator("#download").inner_text().count("scene_") == 4
    view.locator("#opacity input[type=range]").fill("90")
    view.wait_for_function(
        "getComputedStyle(document.querySelector('.colors')).opacity == '0.9'"
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    view.locator("#file button").first.click()
    wrong = tmp_path / "notes.txt"
    wrong.write_text("no image")
    chosen.set_input_files(wrong)
    alert = view.locator("#message [role=alert]")
    alert.wait_for(timeout=60_000)
    assert "notes.txt was not predicted: not a PNG" in alert.inner_text()
    assert view.locator("#picture img").count() == 0
    # Pictures in the page have no host; nothing comes from the network.
    assert {host for host in hosts if ";" not in host} == {served.split("/")[2]}


@_OF_GRADIO
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(image, browser, served, scheme):
    size = {"width": 390, "height": 900}
    view = browser.new_page(viewport=size, color_scheme=scheme)
    _choose(view, served, image)
    view.wait_for_timeout(1000)  # until colors have faded in
    assert not serious_violations(view)
