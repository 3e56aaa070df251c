"""The Markdown pages of the repository, their fenced code, and its commands."""

import functools
import importlib
import re

import ml_collections

from tests.support.programs import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "results").rglob("README.md")),
]
# A directive of the site, such as {toctree}, is fenced like code.
_FENCE = re.compile(r"^```([^`\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# What a notebook states about itself, before its title.
_HEADER = re.compile(r"\A---\n.*?^---\n+", flags=re.DOTALL | re.MULTILINE)


def name_of(path):
    """A page's path from the root."""
    return str(path.relative_to(ROOT))


def prose(text):
    """A page without its fenced code, and without a notebook's header."""
    return _FENCE.sub("", _HEADER.sub("", text))


def code_blocks(path, *languages):
    """The page's blocks of fenced code."""
    for language, block in _FENCE.findall(path.read_text()):
        if language in languages:
            yield block


def code(path, *languages):
    """The page's lines of fenced code, continued lines joined."""
    for block in code_blocks(path, *languages):
        yield from re.sub(r" *\\\n *", " ", block).splitlines()


def programs(line):
    """The arguments of a line that runs a program, its name first; else None."""
    line = line.split(" #")[0].strip().removesuffix("&")
    found = re.search(r"\b(launch|tests)\.[a-z_.]+( .*)?$", line)
    return found[0].split() if found else None


def config_of(arguments) -> ml_collections.ConfigDict:
    """The configuration that `launch.train` would make of its arguments."""
    values = dict(flag.removeprefix("--").partition("=")[::2] for flag in arguments)
    file, _, argument = values["config"].partition(":")
    if file == "my_data/config.py":  # What `launch.prepare_data --init` writes.
        file = "configs/folder.py"
    module = file.removesuffix(".py").replace("/", ".")
    config = importlib.import_module(module).get_config(argument)
    for key, value in values.items():
        if key.startswith("config."):
            _, *sections, name = key.split(".")
            part = functools.reduce(lambda whole, each: whole[each], sections, config)
            kind = type(part[name])
            part[name] = value == "True" if kind is bool else kind(value)
    return config
