"""The page that compares runs."""

import html.parser
import re

import pytest

from launch import report
from tests.support.browser import serious_violations


class _Text(html.parser.HTMLParser):
    """Collects a page's text, pictures and what it would load."""

    def __init__(self, page):
        super().__init__()
        self.text, self.pictures, self.loaded = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.pictures.append(given)
        self.loaded += [given[key] for key in ("src", "href") if key in given]
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "new" / "report.html"
    arguments = [str(trained.baseline), str(trained.mpmc), f"--output={output}"]
    report.main([*arguments, "--images=1"])
    return output


@pytest.fixture
def page(written):
    return _Text(written.read_text())


def test_the_page_needs_no_other_file(page):
    assert page.loaded and all(each.startswith("data:image/") for each in page.loaded)
    assert len(page.pictures) == 4
    assert all(picture["alt"] for picture in page.pictures)


def test_the_page_compares_runs(page):
    for text in (
        "Runs: baseline, mpmc",
        "supervised + MPMC",
        "best, % (step)",
        "Learning curves",
        "Confusion",
        "Reliability",
        "mpmc.enabled",
        "jaxlib",
        "fingerprint of the data",
    ):
        assert text in page.text, text
    # What is the same in both is no difference.
    assert "optimizer.lr" not in page.text
    start = page.text.index("Classes")
    classes = page.text[start : page.text.index("Confusion")]
    assert {"sky", "road", "mean"} <= {*classes}
    shares = [text for text in classes if re.fullmatch(r"\d+(\.\d)?|-", text)]
    assert len(shares) == 2 * (9 + 1)


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_axe_finds_nothing_serious(written, browser, width, scheme):
    size = {"width": width, "height": 900}
    view = browser.new_page(viewport=size, color_scheme=scheme)
    view.goto(written.as_uri())
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.evaluate(
        "[...document.images].every((image) => image.naturalWidth > 0)"
    )
    assert not serious_violations(view)


def test_a_single_run_has_no_settings_to_compare(trained, tmp_path):
    output = tmp_path / "report.html"
    report.main([str(trained.baseline), f"--output={output}", "--images=0"])
    text = _Text(output.read_text()).text
    assert "Environment" in text and "Settings" not in text


def test_mistakes_are_one_line(trained, tmp_path):
    for arguments, message in (
        (["--output=x.txt"], "name an .html file"),
        (["--output=x.html", "--images=-1"], "0 or more are shown"),
    ):
        with pytest.raises(SystemExit, match=message):
            report.main([str(trained.mpmc), *arguments])
    with pytest.raises(SystemExit, match="holds no run"):
        report.main([str(tmp_path), f"--output={tmp_path / 'x.html'}"])
