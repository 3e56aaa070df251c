"""The Markdown pages: their links, the paths and settings they name, their form."""

import ast
import re

import pytest

from configs import base
from tests.support.documents import PAGES, ROOT, name_of, prose

MAX_COLUMNS = 92
MAX_README_LINES = 200
# A path of this repository in backticks; <name> stands for any name.
_PATH = re.compile(
    r"`((?:mpmc_jax|launch|configs|tests|docs|results)/[\w/.<>*-]*|[\w/]+\.md)`"
)
_SECTIONS = {
    name: section
    for name, section in base.get_base().to_dict().items()
    if isinstance(section, dict)
}
# Not the module mpmc_jax.data.
_SETTING = re.compile(rf"(?<!mpmc_jax\.)\b({'|'.join(_SECTIONS)})\.([a-z]\w*)")
# Words that have one spelling here, by another one.
_SPELLINGS = re.compile(
    r"\b(un)?labelled|colour|\bgrey|normalis|optimis|centre|neighbour|initialis", re.I
)


def _anchors(path):
    """The anchors of a page's headings, as GitHub and site generators make them."""
    for heading in re.findall(r"^#+ (.*)$", prose(path.read_text()), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in _anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    for name in _PATH.findall(page.read_text()):
        pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
        beside = page.parent.glob(pattern)
        assert any(ROOT.glob(pattern)) or any(beside), name


def _change_table():
    """The rows of CONTRIBUTING.md's table: what to change, and where."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("## To change something\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    return [pytest.param(*row, id=row[0]) for row in rows[2:]]


def _defined(paths):
    """The functions, classes and constants that Python files define, at any depth."""
    for node in (
        node for path in paths for node in ast.walk(ast.parse(path.read_text()))
    ):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id


@pytest.mark.parametrize(("what", "where"), _change_table())
def test_what_the_change_table_names_is_there(what, where):
    """Every file and folder exists, and every name is defined in one of them."""
    files = set()
    for name in (named := _PATH.findall(what + where)):
        found = [*ROOT.glob(re.sub(r"<\w+>", "*", name).rstrip("/"))]
        assert found, name
        files |= {path for each in found for path in (each, *each.rglob("*.py"))}
    words = set(re.findall(r"`([^`]+)`", what + where)) - {*named}
    modules = {word for word in words if "." in word}
    for word in modules:
        assert (ROOT / f"{word.replace('.', '/')}.py").exists(), word
    defined = set(_defined(path for path in files if path.suffix == ".py"))
    assert words - modules <= defined, words - modules - defined


@pytest.mark.parametrize(("what", "where"), _change_table())
def test_the_change_table_has_a_place_for_each_thing(what, where):
    assert what.count(";") in (0, where.count(";"))


def test_the_modules_that_a_crop_passes_exist():
    text = (ROOT / "docs" / "extending.md").read_text()
    modules = re.findall(r"`((?!mpmc_jax|launch)\w+(?:/\w+)+)`", text)
    assert len(modules) == 25
    for module in modules:
        assert (ROOT / "mpmc_jax" / f"{module}.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_are_declared(page):
    for section, key in _SETTING.findall(page.read_text()):
        # The list train.txt, the program launch/train.py, a file of weights.
        if key not in ("txt", "py", "safetensors"):
            assert key in _SECTIONS[section], f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_have_one_title_and_short_lines(page):
    text = page.read_text()
    assert len(re.findall(r"^# ", prose(text), re.MULTILINE)) == 1
    assert prose(text).startswith("# ")
    for line in prose(text).splitlines():
        # A row of a table cannot be broken.
        assert len(line) <= MAX_COLUMNS or line.startswith("|"), line
    assert not (found := _SPELLINGS.search(text)), found


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MAX_README_LINES
    docs = ROOT / "docs"
    for path in docs.rglob("*.md"):
        assert f"({path.relative_to(ROOT)})" in text, path
    index = (docs / "index.md").read_text()
    for path in docs.rglob("*.md"):
        name = str(path.relative_to(docs))
        assert name == "index.md" or f"({name})" in index, path
        assert name == "index.md" or f"\n{name.removesuffix('.md')}\n" in index, path


def test_every_folder_of_results_has_a_page_that_the_table_names():
    table = (ROOT / "results" / "README.md").read_text()
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        assert (folder / "README.md").exists(), folder
        assert f"({folder.name}/README.md" in table, folder
