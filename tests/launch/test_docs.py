"""The documentation site: it builds without warnings, and its links hold."""

import html.parser
import importlib.util
import subprocess
import sys
import urllib.parse

import pytest

from tests.support.programs import ENVIRONMENT, ROOT

_NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme")
_MISSING = [name for name in _NEEDED if not importlib.util.find_spec(name)]


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as CONTRIBUTING.md says."""
    if _MISSING:
        pytest.skip(f"not installed: {', '.join(_MISSING)} (pip install '.[docs]')")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        ["bash", "launch/docs.sh", str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT | {"MPMC_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def _pages(site):
    """The site's own pages; the theme keeps templates in `_static`."""
    paths = (path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {path: _Page(path) for path in paths}


@pytest.mark.full
def test_links_inside_the_site_hold(site):
    pages = _pages(site)
    assert {site / "index.html", site / "docs" / "api.html"} <= pages.keys()
    broken = []
    for path, page in pages.items():
        for target in page.links:
            if _is_elsewhere(target):
                continue
            file, _, anchor = map(urllib.parse.unquote, target.partition("#"))
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (
                anchor and there in pages and anchor not in pages[there].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken


@pytest.mark.full
def test_pages_load_nothing_from_the_network(site):
    for path, page in _pages(site).items():
        for target in page.loaded:
            assert not _is_elsewhere(target), f"{path.relative_to(site)}: {target}"
            file = urllib.parse.unquote(urllib.parse.urlsplit(target).path)
            assert (path.parent / file).exists(), f"{path.name}: {target}"
