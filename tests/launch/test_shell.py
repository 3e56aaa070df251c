"""The launchers: valid shell, and what they would run, with every argument whole."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import ROOT, wait_for

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
WORKDIR = "--workdir=my runs/it's $HOME"
PROGRAM = ["launch.train", "--config=configs/voc.py:split=92", WORKDIR]


def _bash(*arguments, path=None):
    environment = dict(os.environ)
    if path is not None:
        environment["PATH"] = str(path)
    bash = "/bin/bash" if Path("/bin/bash").exists() else "bash"
    return subprocess.run(
        [bash, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _commands(output):
    """The printed commands, as a shell would split them."""
    lines = [line[2:] for line in output.splitlines() if line.startswith("+ ")]
    return [shlex.split(line) for line in lines]


def test_there_are_launchers():
    names = {path.name for path in SCRIPTS}
    assert {"gpu.sh", "slurm.sh", "tpu_pod.sh", "quickstart.sh", "test.sh"} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    assert _bash("-n", script).returncode == 0
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "--shell=bash", "--external-sources", script.relative_to(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_gpu():
    done = _bash("launch/gpu.sh", "--dry_run", *PROGRAM)
    assert done.returncode == 0, done.stderr
    *first, requirements, install, program = _commands(done.stdout)
    # Where there is an environment, it is not made.
    assert [command[1:3] for command in first] in ([], [["-m", "venv"]])
    assert requirements[-1] == "requirements.txt"
    assert any(word.startswith("jax[cuda12]") for word in install)
    assert program[1:] == ["-m", *PROGRAM]


def test_a_python_that_is_absent_or_too_old_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MPMC_VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "python3.9"))
    needed = "Python 3.11 to 3.13 is needed: name one in the variable PYTHON\n"
    absent = _bash("launch/venv.sh")
    assert absent.stderr == f"error: {tmp_path}/python3.9 is absent; {needed}"
    text = '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\n'
    _program(tmp_path / "python3.9", text)
    old = _bash("launch/venv.sh")
    assert old.stderr == f"error: {tmp_path}/python3.9 is Python 3.9.1; {needed}"
    assert (absent.returncode, old.returncode) == (2, 2)


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def test_a_signal_to_gpu_reaches_the_program(tmp_path):
    _program(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0'\n")
    python = """
case "$*" in
  *launch.train*) trap 'echo told; exit 75' TERM; echo begun; sleep 60 & wait ;;
esac
"""
    _program(tmp_path / "venv" / "bin" / "python", python)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "launch/gpu.sh", *PROGRAM],
        cwd=ROOT,
        env=os.environ | {"MPMC_VENV": str(tmp_path / "venv"), "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "begun")
    process.terminate()
    assert process.stdout.readline() == "told\n"
    assert process.wait(timeout=30) == 75
    process.stdout.close()


def test_slurm():
    script = "launch/slurm.sh"
    given = ["--nodes=2", "--gpus_per_node=4", "--dry_run", "--comment=two words"]
    done = _bash(script, *given, "--", *PROGRAM)
    assert done.returncode == 0, done.stderr
    (submit,) = _commands(done.stdout)
    assert submit[0] == "sbatch" and "--comment=two words" in submit
    assert {"--nodes=2", "--ntasks-per-node=4", "--requeue"} <= set(submit)
    job = done.stdout[done.stdout.index("#!") :]
    assert (
        subprocess.run(["bash", "-n"], input=job, text=True, check=False).returncode
        == 0
    )
    (line,) = [line for line in job.splitlines() if line.startswith("srun")]
    assert shlex.split(line)[-len(PROGRAM) :] == PROGRAM
    bad = _bash(script, "--nodes=two", "--dry_run", "--", *PROGRAM)
    assert bad.returncode == 2 and "--nodes=two" in bad.stderr


def test_tpu_pod():
    script = "launch/tpu_pod.sh"
    named = ["--name=pod", "--zone=us-west4-a", "--dry_run"]
    settings = ["--type=v5litepod-16", "--project=a b", "--spot"]
    done = _bash(script, *named, *settings, "--", *PROGRAM)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.replace("\\\n", "")
    for verb in ("queued-resources create pod", "git archive", "tpu-vm scp"):
        assert verb in printed
    assert "--accelerator-type=v5litepod-16" in printed and "--spot" in printed
    assert "--project=a\\ b" in printed and "v2-alpha-tpuv5-lite" in printed
    # The last command's own text must give the arguments back on the worker.
    last = printed.splitlines()[-1].removeprefix("+ ")
    shown = subprocess.run(
        ["bash", "-c", f"show() {{ printf '%s' \"${{@: -1}}\"; }}; show {last}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith("--command=")
    begin = shown.index("then ") + len("then ")
    words = shlex.split(shown[begin : shown.index(" 2>&1")])
    assert words[0].startswith("MPMC_REVISION=")
    assert words[1:] == [".venv/bin/python", "-m", *PROGRAM, "--distributed"]
    done = _bash(script, *named, "--delete")
    (delete,) = _commands(done.stdout)
    assert delete[3:6] == ["queued-resources", "delete", "pod"]


GCLOUD = """
# Says the next of the states, and lets the program end with the next of the statuses;
# the last one of either stays.
next() {
  head -n 1 "$1"
  if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi
}
cd "$(dirname "$0")"
case "$*" in
  *describe*)
    found=$(next states)
    case $found in
      ABSENT) echo "ERROR: NOT_FOUND: no pod" >&2; exit 1 ;;
      SILENT) echo "ERROR: no network" >&2; exit 1 ;;
    esac
    echo "$found"
    ;;
  *launch.train*) echo program >>calls; exit "$(next statuses)" ;;
  *ssh*) echo "ssh ${*: -1}" >>calls ;;
  *) echo "$3 $4" >>calls ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "statuses", "calls", "error"),
    [
        # Taken away while it runs, which is said late; then told to stop.
        (
            "ABSENT WAITING ACTIVE ACTIVE SILENT SUSPENDED SUSPENDED ABSENT ACTIVE",
            [255, 75, 0],
            ["create", "program", "delete", "create", "program", "program"],
            "",
        ),
        # Taken away before it has begun.
        (
            "ABSENT PROVISIONING SILENT SUSPENDED ABSENT ACTIVE",
            [0],
            ["create", "delete", "create", "program"],
            "",
        ),
        ("ACTIVE", [1], ["program"], "the program ended with status 1"),
        # Where the launcher loses the network, the TPU is not taken for gone.
        ("ACTIVE SILENT", [255], ["program"], "the program ended with status 255"),
        ("ABSENT FAILED", [0], ["create"], "the TPU pod was refused"),
        ("ABSENT", [0], ["create"], "nothing is heard of pod: ERROR: NOT_FOUND"),
        ("SILENT", [0], [], "nothing is heard of pod: ERROR: no network"),
    ],
)
def test_a_pod_is_made_again(tmp_path, states, statuses, calls, error):
    _program(tmp_path / "gcloud", GCLOUD)
    (tmp_path / "calls").touch()
    (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    done = subprocess.run(
        ["bash", "launch/tpu_pod.sh", "--name=pod", "--zone=z", "--type=v6e-16"]
        + ["--setup=mount a:/b /mnt", "--", *PROGRAM],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MPMC_POD_PAUSE": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == (2 if error else 0), done.stdout + done.stderr
    assert error in done.stderr
    if states.startswith("SILENT"):
        assert "waiting for pod: SILENT\nERROR: no network" in done.stdout
    made = (tmp_path / "calls").read_text().splitlines()
    queued = [call.removeprefix("queued-resources ") for call in made]
    assert [call for call in queued if call in ("create", "delete", "program")] == calls
    for before, call in zip(made, made[1:], strict=False):
        if call == "program":
            assert before == "ssh --command=mount a:/b /mnt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch/gpu.sh", *PROGRAM], "nvidia-smi finds no GPU"),
        (["launch/slurm.sh", "--", *PROGRAM], "sbatch is not on this machine"),
        (
            ["launch/tpu_pod.sh", "--name=a", "--zone=b", "--delete"],
            "gcloud is not on this machine",
        ),
        (["launch/tpu_pod.sh", "--nmae=a"], "unknown argument --nmae=a"),
        (
            ["launch/slurm.sh", "--", "launch.predict"],
            "launch.train and launch.evaluate",
        ),
        (["launch/gpu.sh", "--dry-run", *PROGRAM], "--dry-run: a program is needed"),
        (["launch/slurm.sh", "--gpus-per-node=4", "--", *PROGRAM], "say --nodes="),
        (["launch/slurm.sh", "--nodes", "2", "--", *PROGRAM], "say --nodes=NUMBER"),
        (["launch/gpu.sh"], "bash launch/gpu.sh"),
        (["launch/slurm.sh"], "bash launch/slurm.sh"),
        (["launch/tpu_pod.sh", "--name=a"], "bash launch/tpu_pod.sh"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(arguments, message, tmp_path):
    # A machine with the usual tools and none of the cloud's.
    for tool in ("dirname", "sed", "git", "mktemp"):
        found = subprocess.run(
            ["which", tool], capture_output=True, text=True, check=True
        ).stdout.strip()
        (tmp_path / tool).symlink_to(found)
    done = _bash(*arguments, path=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("name", ["gpu", "slurm", "tpu_pod", "quickstart"])
def test_help_is_no_failure(name):
    done = _bash(f"launch/{name}.sh", "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"bash launch/{name}.sh" in done.stdout
