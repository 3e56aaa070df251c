"""The documentation site builds with its notebooks, and its links hold."""

import html.parser
import importlib.util
import re
import subprocess
import sys
import urllib.parse

import pytest

from tests.support.documents import code
from tests.support.programs import ENVIRONMENT, ROOT

_NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme")


class _Page(html.parser.HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found.get("id"), found.get("name")}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("img", "script", "link"):
            self.loaded += [
                found[name]
                for name in ("src", "href")
                if found.get(name) and found.get("rel") != "canonical"
            ]


def _is_elsewhere(target):
    return bool(urllib.parse.urlsplit(target).scheme) or target.startswith("//")


def _broken_links(pages):
    """The links between pages of the site that lead nowhere."""
    for path, page in pages.items():
        for target in page.links:
            if _is_elsewhere(target):
                continue
            file, _, anchor = map(urllib.parse.unquote, target.partition("#"))
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (
                anchor and there in pages and anchor not in pages[there].anchors
            ):
                yield f"{path.name}: {target}"


def _not_local(pages):
    """What pages load from the network, or from files that are not there."""
    for path, page in pages.items():
        for target in page.loaded:
            file = urllib.parse.unquote(urllib.parse.urlsplit(target).path)
            is_local = not _is_elsewhere(target) and (path.parent / file).exists()
            if not (is_local or target.startswith("data:")):
                yield f"{path.name}: {target}"


@pytest.mark.full
def test_the_site_builds_with_its_notebooks(tmp_path):
    """A warning, or an error in a notebook, fails the build."""
    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install '.[docs]')")
    folder = tmp_path / "site"
    done = subprocess.run(
        ["bash", "launch/docs.sh", "--execute", str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT | {"MPMC_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    # The theme keeps templates in `_static`.
    paths = [path for path in folder.rglob("*.html") if "_static" not in path.parts]
    pages = {path: _Page(path) for path in paths}
    assert {folder / "index.html", folder / "docs" / "api.html"} <= pages.keys()
    assert not [*_broken_links(pages)]
    assert not [*_not_local(pages)]
    # What the notebooks print is on their pages.
    for name, text in (("first_run", "steps: 200"), ("own_data", "mean IoU")):
        assert text in (folder / "docs" / "notebooks" / f"{name}.html").read_text()


def test_the_first_run_is_the_quick_start():
    """The page has the commands of the script."""
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    script = re.sub(r" *\\\n *", " ", script)
    script = script.replace('"$workdir', "runs/quickstart").replace('"', "")
    commands = {
        tuple(sorted(line.removeprefix("$python ").split()))
        for line in script.splitlines()
        if line.startswith("$python -m launch.")
    }
    page = {
        tuple(sorted(line.removeprefix("python ").split()))
        for line in code(ROOT / "docs" / "first_run.md", "sh")
    }
    assert len(commands) == 4
    assert commands <= page
