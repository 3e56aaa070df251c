"""What the README and docs/ promise: commands run or parse, the quick start learns."""

import argparse
import ast
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.support.data_sets import make_folder
from tests.support.documents import PAGES, code, config_of, name_of, programs, prose
from tests.support.programs import ENVIRONMENT, ROOT, SMALL, run

# What stands for a value that the reader chooses, and such a value.
PLACEHOLDERS = {
    "METHOD": "unimatch",
    "MPMC": "paper",
    "BACKBONE": "resnet50",
    "SPLIT": "92",
    "NAME": "folder",
    "ZONE": "us-west4-a",
    "$i": "0",
}


class _Parsed(Exception):
    """Carries a program's parser and what it made of the arguments."""


def _parse(monkeypatch, program, arguments):
    """The parser of a program, and what it makes of its arguments."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser, args=None, namespace=None):
        if not arguments:
            raise _Parsed(parser, None)
        found, more = parse(parser, args, namespace)
        # Settings are checked by the program, as those of `launch.train` are.
        assert all(each.startswith("--config.") for each in more), more
        raise _Parsed(parser, found)

    if importlib.util.find_spec(program).submodule_search_locations:
        program += ".__main__"
    module = importlib.import_module(program)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(_Parsed) as parsed:
        module.main(arguments) if program.startswith("launch") else module.main()
    return parsed.value.args


def _options(monkeypatch, program):
    """The options of a program, as they are written."""
    if program == "launch.train":
        importlib.import_module(program)
        return {f"--{name}" for name in flags.FLAGS}
    parser, _ = _parse(monkeypatch, program, [])
    return set(parser._option_string_actions)


def _name(argument):
    """The option's name, if it is one; a setting's is `--config`."""
    if not argument.startswith("--"):
        return None
    return argument.split("=")[0].split(".")[0]


def _filled(line):
    for name, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<![A-Z]){re.escape(name)}(?![A-Za-z])", value, line)
    return line


def _lines():
    """Every line of the pages' code that runs one of our programs."""
    for page in PAGES:
        for line in code(page, "sh", "bash"):
            if programs(line):
                yield pytest.param(_filled(line), id=f"{name_of(page)}-{line[:60]}")


@pytest.mark.parametrize("line", list(_lines()))
def test_every_command_in_code_parses(monkeypatch, line):
    program, *arguments = programs(line)
    if program == "launch.train":
        options = _options(monkeypatch, program)
        assert {_name(argument) for argument in arguments} <= options
        config_of(arguments)
        if "--fit" not in arguments:  # which trains nothing
            assert any(argument.startswith("--workdir=") for argument in arguments)
    else:
        _parse(monkeypatch, program, arguments)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_prose_exists(monkeypatch, page):
    for text in re.findall(r"`([^`]+)`", prose(page.read_text())):
        found = programs(" ".join(text.split()))
        if found and importlib.util.find_spec(found[0]):
            names = {_name(argument) for argument in found[1:]} - {None}
            with monkeypatch.context() as context:
                assert names <= _options(context, found[0]), text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_of_a_script_exists(page):
    lines = [*code(page, "sh", "bash"), *re.findall(r"`([^`]+)`", page.read_text())]
    for line in lines:
        for script, rest in re.findall(r"bash ((?:launch|results)/\S+\.sh)(.*)", line):
            text = (ROOT / script).read_text()
            own = rest.split(" -- ")[0].split(" launch.")[0].split(" #")[0]
            for option in filter(None, map(_name, own.split())):
                assert option in text, f"{script} {option}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_code_names_what_there_is(page):
    source = "\n".join(code(page, "python"))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                is_there = hasattr(module, alias.name)
                assert is_there or importlib.util.find_spec(submodule), submodule


def test_the_documents_have_commands():
    """The patterns above find what they are meant for."""
    found = {programs(each.values[0])[0] for each in _lines()}
    assert found >= {
        f"launch.{name}"
        for name in (
            "bench",
            "bench.smoke_matrix",
            "check_data",
            "convert_weights",
            "evaluate",
            "experiments",
            "predict",
            "prepare_data",
            "train",
        )
    }


@pytest.mark.full
def test_every_command_of_the_readme_runs(tmp_path):
    """Code marked `bash`, of any page, is run; code marked `sh` is parsed above."""
    lines = [line for page in PAGES for line in code(page, "bash")]
    ours = [line.split("#")[0].strip() for line in lines if "python -m launch" in line]
    others = [
        line for line in lines if line not in ours and "python -m launch" not in line
    ]
    # These are run elsewhere: by CI itself, and by the quick start's own test.
    for line in others:
        assert re.match(
            r"bash launch/(quickstart|test)\.sh|.*-m (venv|pip install)|source ", line
        )
    source = make_folder(tmp_path / "mine", images=12)
    (source / "unlabeled").mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(source / "unlabeled" / f"u{i}.png")
    assert len(ours) == 5
    for line in ours:
        arguments = line.replace("my_data", str(source)).replace(
            "runs/", f"{tmp_path}/runs/"
        )
        arguments = arguments.split()[2:]
        if arguments[0] == "launch.prepare_data":
            arguments.append(f"--data_dir={tmp_path}/data")
        if arguments[0] == "launch.train":
            arguments += SMALL
        run(*arguments)
    assert (
        len(list((tmp_path / "runs" / "mine" / "predictions").glob("*_index.png"))) == 6
    )


@pytest.mark.full
def test_the_quick_start_reaches_its_mark(tmp_path):
    """About eight minutes; it asserts val/miou and the patch classifier itself."""
    environment = ENVIRONMENT | {"XLA_FLAGS": "", "MPMC_VENV": sys.prefix}
    environment["PYTHONPATH"] = ""
    # Its data set, too, goes where it is run.
    for folder in ("launch", "configs", "mpmc_jax"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    done = subprocess.run(
        ["bash", "launch/quickstart.sh", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "run" / "figures" / "panels.png").exists()
