r"""Long trials of a run's endurance; scripts, with their results committed.

python -m tests.endurance kills --output=results/endurance/kills.json
python -m tests.endurance stops --output=results/endurance/stops.json
python -m tests.endurance soak  --output=results/endurance/soak.json --steps=2000
python -m tests.endurance story --output=results/endurance/story.json --steps=60

kills: SIGKILL at random moments, start-up, saves and evaluations included; the run must
end as one that was never stopped, bit for bit. stops: SIGTERM at random moments behind
the first step. soak: memory, open files and compiled programs over many steps. story:
SIGKILL at random moments of every program, from preparing a folder of images to the
converted weights; after each kill no partial result is there, and at the end all are
those of programs that were never stopped.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from launch.bench.timing import resident_bytes
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.training.manifest import make_manifest
from tests.support.data_sets import make_folder, prepare_synthetic
from tests.support.programs import start

STEPS = 1000
CONFIG = (
    "--config=configs/synthetic.py:method=unimatch,mpmc=recommended,backbone=resnet18,"
    "split=4",
    "--config.model.width=8",
    "--config.data.crop=33",
    "--config.train.batch_size=2",
    "--config.train.eval_every=25",
    "--config.train.checkpoint_every=10",
    "--config.train.log_every=1",
)
# Start-up and the compiled step from the cache, and what is trained in one go, seconds.
START, PART = 25, 6


# Of the story: a run that compiles soon, and how many kills each program gets.
STORY_CONFIG = (
    "--config=configs/folder.py:method=supervised,backbone=resnet18,split=4",
    *CONFIG[1:],
)
STORY = {
    "prepare_data": 10,
    "train": 16,
    "evaluate": 8,
    "predict": 8,
    "convert_weights": 8,
}


class Trial:
    """A program in a process of its own that may be signalled.

    Attributes:
      output: all it said so far.
    """

    def __init__(self, log: Path, *arguments: str, **environment: str):
        self._log = log
        with self._log.open("w") as file:
            self.process = start(*arguments, output=file, XLA_FLAGS="", **environment)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float, text: str = "\0") -> bool:
        """Whether `text` came up; comes back as well when time or process end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.ended():
            if text in self.output:
                return True
            time.sleep(0.01)
        return text in self.output

    def finish(self) -> None:
        """Waits for an end without an error."""
        self.process.wait()
        assert self.process.returncode == 0, self.output[-3000:]

    def kill(self) -> None:
        """Ends it as a machine that fails does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def training(place: Path, workdir: Path, steps: int, **environment: str) -> Trial:
    """A run on the synthetic data of `place`, which begins or goes on."""
    return Trial(
        place / "log.txt",
        "launch.train",
        *CONFIG,
        f"--config.data.data_dir={place / 'data'}",
        f"--config.train.steps={steps}",
        f"--workdir={workdir}",
        **environment,
    )


def whole(place: Path, steps: int) -> Path:
    """The run that is never stopped."""
    training(place, place / "whole", steps).finish()
    return place / "whole"


def last(workdir: Path, steps: int) -> dict:
    """Position and checksum of the last checkpoint."""
    return json.loads(
        (workdir / "checkpoints" / str(steps) / "meta" / "metadata").read_text()
    )


def numbers(workdir: Path, kind: str) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k != "train/images_per_second"}
        for line in lines
        if any(name.startswith(kind) for name in line)
    ]


def kills(place: Path, steps: int, times: int, draw: random.Random) -> dict:
    """SIGKILL `times` times, a third of them before the first step."""
    workdir = place / "killed"
    reached = []
    while len(reached) < times:
        trial = training(place, workdir, steps)
        if draw.random() < 1 / 3:
            trial.wait(draw.uniform(0, START))
        elif trial.wait(600, "first step done"):
            trial.wait(draw.uniform(0, PART))
        assert not trial.ended(), f"it ended too early: {trial.output[-3000:]}"
        trial.kill()
        found = re.findall(r"step (\d+)/", trial.output)
        reached.append(int(found[-1]) if found else None)
    training(place, workdir, steps).finish()
    other = whole(place, steps)
    return {
        "kills": times,
        "last_step_said_before_each": reached,
        "damaged_checkpoints": len(list((workdir / "checkpoints").glob("damaged-*"))),
        "last_checkpoint_is_equal": last(workdir, steps) == last(other, steps),
        "train_lines_are_equal": numbers(workdir, "train/") == numbers(other, "train/"),
        "val_lines_are_equal": numbers(workdir, "val/") == numbers(other, "val/"),
        "train_lines": len(numbers(workdir, "train/")),
        "val_lines": len(numbers(workdir, "val/")),
    }


class Program(NamedTuple):
    """A program of the story.

    Attributes:
      arguments: (home) -> its command line.
      results: (home) -> what it made that a reader would take, by name.
    """

    arguments: Callable[[Path], tuple[str, ...]]
    results: Callable[[Path], dict[str, str]]


def run_results(workdir: Path, steps: int) -> dict[str, str]:
    """Last checkpoint and lines of a run that ended."""
    return {
        "checkpoint": json.dumps(last(workdir, steps)),
        "train": json.dumps(numbers(workdir, "train/")),
        "val": json.dumps(numbers(workdir, "val/")),
        "damaged": str(len(list((workdir / "checkpoints").glob("damaged-*")))),
    }


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 of the files of a folder that a reader takes for results."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def prepared(data_dir: Path) -> dict[str, str]:
    """Facts and records of the data set that a reader finds there.

    The bytes of record files differ between processes: a record's fields have no order.
    """
    try:
        info = open_dataset(str(data_dir), "folder")
    except FileNotFoundError:
        return {}
    found = {"facts": repr(dataclasses.replace(info, directory=Path()))}
    for split, ids in info.ids.items():
        for key, record in zip(ids, info.records(split), strict=True):
            content = repr(sorted(record.items())).encode()
            found[f"{split}/{key}"] = hashlib.sha256(content).hexdigest()
    return found


def evaluation(home: Path) -> dict[str, str]:
    """The result file, less seconds, versions and dates."""
    found = {}
    for path in (home / "run").glob("eval_*.json"):
        result = json.loads(path.read_text())
        for name in ("seconds", "run", "manifest"):
            del result[name]
        found[path.name] = json.dumps(result)
    return found


def programs(source: Path, steps: int) -> dict[str, Program]:
    """The programs of the story in their order; each needs those before it."""
    return {
        "prepare_data": Program(
            lambda home: (
                "--dataset=folder",
                f"--source={source}",
                f"--data_dir={home / 'data'}",
            ),
            lambda home: prepared(home / "data"),
        ),
        "train": Program(
            lambda home: (
                *STORY_CONFIG,
                f"--config.data.data_dir={home / 'data'}",
                f"--config.train.steps={steps}",
                f"--workdir={home / 'run'}",
            ),
            lambda home: run_results(home / "run", steps),
        ),
        "evaluate": Program(lambda home: (f"--workdir={home / 'run'}",), evaluation),
        "predict": Program(
            lambda home: (
                f"--workdir={home / 'run'}",
                f"--input={source / 'images'}",
                f"--output={home / 'predictions'}",
            ),
            lambda home: digests(home / "predictions", "**/[!.]*"),
        ),
        "convert_weights": Program(
            lambda home: (
                f"--input={home / 'run'}",
                f"--output={home / 'run.safetensors'}",
            ),
            lambda home: digests(home, "*.safetensors"),
        ),
    }


def story(place: Path, steps: int, times: int, draw: random.Random) -> dict:
    """SIGKILL `times` times, spread over all programs as `STORY` has it."""
    source = make_folder(place / "source", images=40)
    homes = place / "whole", place / "killed"
    for home in homes:
        home.mkdir()
    found, total = {}, sum(STORY.values())
    for name, program in programs(source, steps).items():
        begin = time.monotonic()
        run_program(name, program, homes[0]).finish()
        seconds = time.monotonic() - begin
        count = round(STORY[name] * times / total)
        lived = kill_program(name, program, homes, count, seconds, draw)
        equal = program.results(homes[1]) == program.results(homes[0])
        found[name] = {
            "seconds_of_the_whole": round(seconds, 1),
            "seconds_before_each_kill": lived,
            "results": len(program.results(homes[0])),
            "results_are_equal": equal,
        }
    kills = sum(len(each["seconds_before_each_kill"]) for each in found.values())
    return {"kills": kills, "programs": found}


def run_program(name: str, program: Program, home: Path) -> Trial:
    """Starts a program, or lets it go on."""
    return Trial(home / f"{name}.txt", f"launch.{name}", *program.arguments(home))


def kill_program(
    name: str,
    program: Program,
    homes: tuple[Path, Path],
    count: int,
    seconds: float,
    draw: random.Random,
) -> list[float]:
    """Kills a program `count` times, looks at what it left, then lets it end.

    One that ended before its time comes begins anew: what it made is removed.

    Returns:
      Seconds before each kill.
    """
    expected, lived, is_new = program.results(homes[0]), [], True
    while len(lived) < count:
        trial, begin = run_program(name, program, homes[1]), time.monotonic()
        trial.wait(draw.uniform(0, seconds))
        if trial.ended():
            trial.finish()
            assert program.results(homes[1]) == expected
            if is_new:  # The first one compiled, which others need not.
                seconds = min(seconds, time.monotonic() - begin)
            remove(name, homes[1])
            is_new = True
            continue
        trial.kill()
        is_new = False
        lived.append(round(time.monotonic() - begin, 2))
        if name == "train":
            continue  # It goes on from what is there.
        there = program.results(homes[1])
        partial = {key for key in there if there[key] != expected.get(key)}
        assert not partial, f"{name} left {partial}"
    run_program(name, program, homes[1]).finish()
    return lived


def remove(name: str, home: Path) -> None:
    """Takes away what a program made."""
    made = {
        "prepare_data": "data",
        "train": "run",
        "evaluate": "run/eval_*.json",
        "predict": "predictions",
        "convert_weights": "run.safetensors",
    }
    for path in home.glob(made[name]):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def stops(place: Path, steps: int, times: int, draw: random.Random) -> dict:
    """SIGTERM `times` times behind the first step of a start."""
    workdir = place / "stopped"
    seconds, statuses, said = [], [], []
    for _ in range(times):
        trial = training(place, workdir, steps)
        assert trial.wait(600, "first step done"), trial.output[-3000:]
        trial.wait(draw.uniform(0, PART))
        begin = time.monotonic()
        trial.process.send_signal(signal.SIGTERM)
        statuses.append(trial.process.wait())
        seconds.append(round(time.monotonic() - begin, 3))
        found = re.search(r"stopped by SIGTERM at step (\d+)", trial.output)
        said.append(found and int(found[1]))
    training(place, workdir, steps).finish()
    other = whole(place, steps)
    return {
        "stops": times,
        "seconds_to_leave": seconds,
        "statuses": statuses,
        "saved_steps": said,
        "last_checkpoint_is_equal": last(workdir, steps) == last(other, steps),
        "train_lines_are_equal": numbers(workdir, "train/") == numbers(other, "train/"),
        "val_lines_are_equal": numbers(workdir, "val/") == numbers(other, "val/"),
    }


def soak(place: Path, steps: int) -> dict:
    """Resident memory, open files and compilations of one run."""
    trial = training(place, place / "soak", steps, JAX_LOG_COMPILES="1")
    proc = Path(f"/proc/{trial.process.pid}")
    trial.wait(600, "first step done")
    samples = []
    while not trial.ended():
        try:
            resident = resident_bytes(trial.process.pid)
            samples.append((resident, len(list((proc / "fd").iterdir()))))
        except OSError:
            break
        time.sleep(0.25)
    trial.process.wait()
    assert trial.process.returncode == 0, trial.output[-3000:]
    # In order, so that growth is told from what comes and goes.
    parts = [samples[i * len(samples) // 10 :][: len(samples) // 10] for i in range(10)]
    compiled = re.findall(r"Finished XLA compilation of (\S+)", trial.output)
    after = trial.output.split(f"step {steps // 2}/", 1)[1]
    return {
        "samples": len(samples),
        "resident_mib_by_tenths": [
            round(statistics.median(x for x, _ in part) / 2**20, 1) for part in parts
        ],
        "most_open_files_by_tenths": [max(x for _, x in part) for part in parts],
        # What pmap calls the step.
        "compilations_of_the_step": sum("_fun" in name for name in compiled),
        "compilations": len(compiled),
        "compilations_in_the_second_half": len(
            re.findall(r"Finished XLA compilation of", after)
        ),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("kills", "stops", "soak", "story"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if args.what != "story":
            prepare_synthetic(place / "data", train=13, val=4)
        if args.what == "soak":
            found = soak(place, args.steps)
        else:
            run = {"kills": kills, "stops": stops, "story": story}[args.what]
            times = args.times or {"kills": 25, "stops": 10, "story": 50}[args.what]
            found = run(place, args.steps, times, draw)
    found |= {
        "what": args.what,
        "steps": args.steps,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "config": STORY_CONFIG if args.what == "story" else CONFIG,
        "manifest": make_manifest(
            args.seed, {"dataset": "folder" if args.what == "story" else "synthetic"}
        ),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
