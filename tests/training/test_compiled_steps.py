"""Methods with a warm-up, and methods that ask the pipeline for images."""

import dataclasses
import json
import types

import chex
import jax
import numpy as np
import pytest

from mpmc_jax.experiments import build, evaluation
from mpmc_jax.experiments.build import init_state, state_shape
from mpmc_jax.methods.supervised import SupervisedOnly
from mpmc_jax.training import loop, metric_writer
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.compiled_steps import Programs
from mpmc_jax.training.parallel import Layout, Parallel
from tests.support import tiny
from tests.training.test_loop import score

U2PL = {
    "u2pl__bank_size": 40,
    "u2pl__bank_size_first": 60,
    "u2pl__queries": 8,
    "u2pl__negatives": 5,
}


@dataclasses.dataclass(frozen=True)
class Phased(SupervisedOnly):
    """Another method in the epochs 1 and 2."""

    def phase(self, epoch):
        return SupervisedOnly(ema_decay=0.5) if epoch in (1, 2) else self


class Counting:
    """Compiles nothing, and counts."""

    def __init__(self):
        self.compiled = []

    def compile(self, step):
        self.compiled.append(step)
        return len(self.compiled)


def test_a_phase_is_compiled_once_wherever_a_run_begins():
    parts = tiny.setup(tiny.config("method=supervised"))
    config = dataclasses.replace(parts.step, method=Phased())
    counting = Counting()
    programs = Programs(counting, config)
    epoch = tiny.STEPS_PER_EPOCH
    assert programs.needs_compiling(2 * epoch)
    served = [programs.get(step) for step in range(2 * epoch, 5 * epoch)]
    assert served == [1] * epoch + [2] * (2 * epoch)
    assert not programs.needs_compiling(0) and programs.get(epoch) == 1
    changes = [step for step in range(1, 5 * epoch) if programs.begins_phase(step)]
    assert changes == [epoch, 3 * epoch]
    assert len(counting.compiled) == 2


def test_the_student_is_evaluated_during_a_warmup():
    cfg = tiny.config("method=u2pl")
    parts = tiny.setup(cfg)

    def used(step):
        state = types.SimpleNamespace(step=np.int32(step), ema_params={})
        return evaluation.evaluated_network(cfg, parts, state).name

    # The fifth step is the warm-up's last one.
    assert [used(step) for step in (0, 1, 5, 6, 50)] == ["student"] * 3 + [
        "teacher"
    ] * 2
    cfg.eval.network = "teacher"
    assert used(1) == "teacher"


def test_a_teacher_that_begins_apart_shares_the_backbone():
    state = init_state(tiny.setup(tiny.config("method=u2pl")), 0)
    student, teacher = state.params["student"], state.ema_params["student"]
    chex.assert_trees_all_equal(teacher["backbone"], student["backbone"])
    for part in student.keys() - {"backbone"}:
        assert tiny.difference(teacher[part], student[part]) > 0.01, part


class Served:
    """Toy batches whose partners are the images that were asked for."""

    def __init__(self, cfg, method, start):
        self.cfg, self.method, self.step = cfg, method, start
        self.asked = {}

    def request(self, step, images):
        assert step not in self.asked
        self.asked[step] = np.asarray(images)

    def __next__(self):
        batch = tiny.batch(self.step, self.cfg, self.method)
        if self.method.delay:
            index = self.asked[self.step].astype(np.int32)
            assert ((index >= 0) & (index < 100)).all()
            # An image is a function of its place in the list.
            of_index = [tiny.batch(i, self.cfg, self.method).partner for i in index]
            crops = jax.tree.map(lambda *x: np.stack([one[0] for one in x]), *of_index)
            place = batch.partner.batch_index
            batch = batch.replace(partner=crops.replace(index=index, batch_index=place))
        self.step += 1
        return batch

    def get_state(self):
        return {"next_index": self.step}

    def close(self):
        pass


def go(cfg, directory, steps):
    directory.mkdir(exist_ok=True)
    parts = tiny.setup(cfg)
    checkpointer = Checkpointer(directory / "checkpoints", keep=2)
    restored = checkpointer.restore_latest(state_shape(parts))
    state = restored.state if restored else init_state(parts, cfg.seed)
    start = int(state.step)
    reporter = metric_writer.MetricWriter(directory, start, steps, cfg.train.batch_size)
    data = Served(cfg, parts.step.method, start)
    parallel = Parallel("pmap", Layout(cfg.train.batch_size, 2, 1), 1)
    try:
        state = loop.train(
            loop.LoopConfig(steps, 2, eval_every=100, checkpoint_every=100),
            parts.step,
            parallel,
            state,
            data,
            evaluate=score,
            checkpointer=checkpointer,
            report=reporter,
            names=lambda batch: {},
            place=parallel.place,
        )
    finally:
        reporter.close()
        checkpointer.close()
    return state, data


@pytest.mark.full
@pytest.mark.parametrize(
    "argument, changes, steps",
    [
        ("method=u2pl,mpmc=recommended", U2PL, (4, 8)),
        ("method=ael,mpmc=recommended", {"method__threshold": 0.0}, (3, 6)),
    ],
)
def test_going_on_equals_never_having_stopped(tmp_path, argument, changes, steps):
    cfg = tiny.config(argument, **changes)
    whole, data = go(cfg, tmp_path / "whole", steps[1])
    go(cfg, tmp_path / "halves", steps[0])
    halves, again = go(cfg, tmp_path / "halves", steps[1])
    chex.assert_trees_all_equal(halves, whole)
    for step, images in again.asked.items():
        np.testing.assert_array_equal(images, data.asked[step])
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    if "u2pl" in argument:
        # The warm-up ends with step 5, and so does its last line.
        assert [line["step"] for line in lines] == [2, 4, 5, 6, 8]
        unlabeled = ["train/loss_unlabeled" in line for line in lines]
        assert unlabeled == [False] * 3 + [True] * 2
        assert all(line["train/loss_contrast"] > 0 for line in lines[3:])
    else:
        assert all(line["train/loss_unlabeled"] > 0 for line in lines)


def test_a_delay_that_the_loop_cannot_keep_is_refused():
    for delay in (0, loop.METRICS_LAG):
        with pytest.raises(ValueError, match=f"ael.delay={delay}: .* at least 3"):
            tiny.setup(tiny.config("method=ael", ael__delay=delay))


def test_a_method_that_does_not_fit_says_its_bytes():
    parts = tiny.setup(tiny.config("method=u2pl"))
    cfg = tiny.config("method=u2pl")
    build.check_memory(cfg, parts, 1, 10**9)
    with pytest.raises(ValueError, match=r"0\.04 GB by u2pl.bank_size .*lower these"):
        # Enough for the network, which is looked at first.
        build.check_memory(cfg, parts, 1, 10**7)
