r"""Long trials of a run's endurance; scripts, with their results committed.

python -m tests.endurance kills --output=results/endurance/kills.json
python -m tests.endurance stops --output=results/endurance/stops.json
python -m tests.endurance soak  --output=results/endurance/soak.json --steps=2000

kills: SIGKILL at random moments, start-up, saves and evaluations included; the run must
end as one that was never stopped, bit for bit. stops: SIGTERM at random moments behind
the first step. soak: memory, open files and compiled programs over many steps.
"""

import argparse
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from data_sets import prepare_synthetic
from programs import start

from launch.measuring import resident_bytes
from mpmc_jax.training import report

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


class Trial:
    """A run in a process of its own that may be signalled.

    Attributes:
      output: all it said so far.
    """

    def __init__(self, place: Path, workdir: Path, steps: int, **environment: str):
        self._log = place / "log.txt"
        with self._log.open("w") as file:
            self.process = start(
                "launch.train",
                *CONFIG,
                f"--config.data.data_dir={place / 'data'}",
                f"--config.train.steps={steps}",
                f"--workdir={workdir}",
                output=file,
                XLA_FLAGS="",
                **environment,
            )

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


def whole(place: Path, steps: int) -> Path:
    """The run that is never stopped."""
    trial = Trial(place, place / "whole", steps)
    trial.process.wait()
    assert trial.process.returncode == 0, trial.output[-3000:]
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
        trial = Trial(place, workdir, steps)
        if draw.random() < 1 / 3:
            trial.wait(draw.uniform(0, START))
        elif trial.wait(600, "first step done"):
            trial.wait(draw.uniform(0, PART))
        assert not trial.ended(), f"it ended too early: {trial.output[-3000:]}"
        trial.process.send_signal(signal.SIGKILL)
        trial.process.wait()
        found = re.findall(r"step (\d+)/", trial.output)
        reached.append(int(found[-1]) if found else None)
    trial = Trial(place, workdir, steps)
    trial.process.wait()
    assert trial.process.returncode == 0, trial.output[-3000:]
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


def stops(place: Path, steps: int, times: int, draw: random.Random) -> dict:
    """SIGTERM `times` times behind the first step of a start."""
    workdir = place / "stopped"
    seconds, statuses, said = [], [], []
    for _ in range(times):
        trial = Trial(place, workdir, steps)
        assert trial.wait(600, "first step done"), trial.output[-3000:]
        trial.wait(draw.uniform(0, PART))
        begin = time.monotonic()
        trial.process.send_signal(signal.SIGTERM)
        statuses.append(trial.process.wait())
        seconds.append(round(time.monotonic() - begin, 3))
        found = re.search(r"stopped by SIGTERM at step (\d+)", trial.output)
        said.append(found and int(found[1]))
    trial = Trial(place, workdir, steps)
    trial.process.wait()
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
    trial = Trial(place, place / "soak", steps, JAX_LOG_COMPILES="1")
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
    parser.add_argument("what", choices=("kills", "stops", "soak"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare_synthetic(place / "data", train=13, val=4)
        if args.what == "soak":
            found = soak(place, args.steps)
        else:
            run = {"kills": kills, "stops": stops}[args.what]
            times = args.times or {"kills": 25, "stops": 10}[args.what]
            found = run(place, args.steps, times, draw)
    found |= {
        "what": args.what,
        "steps": args.steps,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "config": CONFIG,
        "manifest": report.manifest(args.seed, {"dataset": "synthetic"}),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
