"""The Dockerfiles do, line by line, what the README says."""

import re
import shlex

import pytest

from tests.support.documents import code, name_of
from tests.support.programs import ROOT

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
# Folders that programs need; tests and documents stay outside.
_PROGRAMS = {"configs", "launch", "mpmc_jax"}


def _instructions(path):
    """The instructions of a Dockerfile, as (keyword, text)."""
    lines = [line for line in path.read_text().splitlines() if line[:1] != "#"]
    return [tuple(line.split(" ", 1)) for line in lines if line]


def _commands(page):
    """The shell commands of a page, without their comments."""
    return {line.split("  #")[0].strip() for line in code(page, "bash", "sh")}


def test_there_is_one_for_cpus_and_one_for_cuda():
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_command_is_one_of_the_readme(path):
    commands = _commands(ROOT / "README.md")
    runs = [text for keyword, text in _instructions(path) if keyword == "RUN"]
    assert len(runs) == 2 and set(runs) <= commands
    assert ("jax[cuda12]" in runs[1]) == (path.suffix == ".cuda")
    # Of the README's first commands, the activation is an ENV.
    assert any(line.startswith("source .venv/bin/activate") for line in commands)
    assert ("ENV", "PATH=/mpmc_jax/.venv/bin:$PATH") in _instructions(path)
    assert ("WORKDIR", "/mpmc_jax") in _instructions(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_supported_python_gets_all_that_programs_need(path):
    (image,) = [text for keyword, text in _instructions(path) if keyword == "FROM"]
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1])
    low, high = re.search(
        r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "README.md").read_text()
    ).groups()
    assert int(low) <= minor <= int(high)
    copied = {
        text.split()[0] for keyword, text in _instructions(path) if keyword == "COPY"
    }
    assert copied == {*_PROGRAMS, "requirements.txt"}
    assert all((ROOT / name).exists() for name in copied)


def test_the_page_builds_both():
    lines = [shlex.split(line) for line in code(ROOT / "docs" / "docker.md", "sh")]
    built = [line for line in lines if line[:2] == ["docker", "build"]]
    files = {
        argument.removeprefix("--file=")
        for line in built
        for argument in line
        if argument.startswith("--file=")
    }
    assert files == {name_of(path) for path in FILES}
    tags = [line[-2].removeprefix("--tag=") for line in built]
    runs = [line for line in lines if line[:2] == ["docker", "run"]]
    assert [line[-1] for line in runs] == tags
    for line in runs:
        mounted = [a.split(":")[-1] for a in line if a.startswith("--volume=")]
        assert mounted == [f"/mpmc_jax/{name}" for name in ("data", "my_data", "runs")]
