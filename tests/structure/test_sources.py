"""Sizes, configuration keys and documented names, read from the sources."""

import ast
import pathlib
import re

import pytest

from configs import base
from mpmc_jax.plugins.registry import PLUGINS

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDERS = ("mpmc_jax", "launch", "configs", "tests")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))
PROGRAMS = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in FOLDERS[:2]]

# A topic that reads better whole may be this long; 300 is the habit.
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# Files that are tables of data, whatever their length.
TABLES = {"configs/presets.py"}


SECTIONS = {
    name: section
    for name, section in base.get_base().to_dict().items()
    if isinstance(section, dict)
}


def _name(path):
    return str(path.relative_to(ROOT))


def _tree(path):
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_are_short(path):
    if _name(path) not in TABLES:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


def _sees_config(path):
    """Whether a file may handle a ConfigDict: builders, programs, the run's record."""
    rooms = {"launch", "experiments"} & set(path.relative_to(ROOT).parts)
    return bool(rooms) or path.name in ("build.py", "registry.py", "workdir.py")


def _chain(node):
    """The attributes of `a.b.c`, outermost name first; None under calls and such."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def _reads_of(path):
    """(section, key) of every `config.section.key`, the section named or not."""
    tree = _tree(path)
    sections = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            chain = _chain(node.value) or []
            if chain[-2:-1] == ["config"]:
                sections[node.targets[0].id] = chain[-1]
    for node in ast.walk(tree):
        # `f(**{key: section[key] for key in section})` hands all of a section over.
        if isinstance(node, ast.comprehension) and isinstance(node.iter, ast.Name):
            section = sections.get(node.iter.id)
            yield from ((section, key) for key in SECTIONS.get(section, ()))
        chain = _chain(node) if isinstance(node, ast.Attribute) else None
        if chain and chain[0] in sections:
            yield sections[chain[0]], chain[1]
        elif chain and "config" in chain[:-2]:
            section, key, *_ = chain[chain.index("config") + 1 :]
            yield section, key


def _config_reads():
    reads = {
        read for path in PROGRAMS if _sees_config(path) for read in _reads_of(path)
    }
    # A plug-in is built from all values of its section.
    return reads | {(name, key) for name in PLUGINS for key in SECTIONS[name]}


def test_every_configuration_key_is_read():
    reads = _config_reads()
    unread = [
        f"{section}.{key}"
        for section, keys in SECTIONS.items()
        for key in keys
        if (section, key) not in reads
    ]
    assert not unread, f"declared in base_config.py and never read: {unread}"


def test_every_key_that_is_read_is_declared():
    unknown = [
        ".".join(read)
        for read in _config_reads()
        if read[0] in SECTIONS and read[1] not in SECTIONS[read[0]]
    ]
    assert not unknown, f"read, but not declared in base_config.py: {unknown}"


def test_no_key_has_a_default_where_it_is_read():
    pattern = re.compile(r"\bconfig\w*(\.\w+)*\.get\(")
    found = [_name(path) for path in PROGRAMS if pattern.search(path.read_text())]
    assert not found, f"`.get(` on a configuration: {found}"


def test_only_builders_see_a_configuration_object():
    found = [
        _name(path)
        for path in PROGRAMS
        if "ConfigDict" in path.read_text() and not _sees_config(path)
    ]
    assert not found, f"a ConfigDict beyond build.py and launch/: {found}"


def _exports():
    for node in _tree(ROOT / "mpmc_jax/__init__.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError("mpmc_jax/__init__.py states no __all__")


def test_the_package_exports_what_the_readme_documents():
    import mpmc_jax

    exports = _exports()
    readme = (ROOT / "README.md").read_text()
    undocumented = [
        name for name in exports if not re.search(rf"`[^`\n]*\b{name}\b", readme)
    ]
    assert not undocumented, f"exported, but not in README.md: {undocumented}"
    for name in exports:
        assert hasattr(mpmc_jax, name), name
    assert re.fullmatch(r"\d+\.\d+\.\d+", mpmc_jax.__version__)


def test_nothing_points_outside_the_repository():
    suffixes = {".py", ".sh", ".toml", ".md", ".yaml", ".cff"}
    files = [
        path
        for name in (*FOLDERS, "results")
        for path in (ROOT / name).rglob("*")
        if path.suffix in suffixes
    ]
    files += [path for path in ROOT.iterdir() if path.suffix in suffixes]
    home = str(ROOT.parent)
    outside = [_name(p) for p in files if len(home) > 1 and home + "/" in p.read_text()]
    assert not outside
