"""Three steps in float64 do not depend on how many processes hold the devices."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mpmc_jax import distributed
from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.training.checkpoint.manager import Checkpointer
from tests.support import tiny
from tests.support.programs import ROOT, free_address
from tests.support.toy_dataset import make_dataset
from tests.support.x64 import call_x64
from tests.support.xla import device_flags
from tests.training.test_compiled_steps import U2PL

STEPS = 3


def _wide_run(method: str, devices: int, steps: int, state=None):
    """State and metrics of some steps; U2PL's groups divide over four devices only."""
    changes = {"train__batch_size": 16}
    if method == "u2pl":
        # Without a warm-up: the banks are filled and drawn from.
        changes = {**U2PL, "u2pl__warmup_epochs": 0}
    cfg = tiny.config(f"method={method},mpmc=recommended", **changes)
    state, metrics = tiny.run(cfg, steps, devices=devices, state=state)
    return state, [m.values for m in metrics]


def _confusion(method: str, state) -> np.ndarray:
    """Of the student on pictures that all processes share."""
    module = tiny.setup(tiny.config(f"method={method}")).step.modules["student"]
    params, stats = state.params["student"], state.batch_stats["student"]
    variables = jax.device_get({"params": params, "batch_stats": stats})
    dataset = make_dataset([(24, 30)] * 6 + [(18, 18)] * 5)
    for example in dataset:
        example.label[example.label >= tiny.CLASSES] = 255
    found = Evaluator(module, tiny.CLASSES, batch_size=2).run(variables, dataset)
    assert found.confusion.sum() > 0
    return found.confusion


def write(method: str, target: str) -> None:
    """Runs on all devices of all processes; each writes what it then holds."""
    index, count = jax.process_index(), jax.process_count()
    assert distributed.from_first(7 + index) == 7
    assert distributed.all_agree(True) and distributed.all_agree(index < count)
    assert distributed.all_agree(index == 0) == (count == 1)
    state, values = _wide_run(method, 0, steps=STEPS)
    leaves = jax.tree.leaves((state, values, _confusion(method, state)))
    arrays = {f"{i:05}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    np.savez(f"{target}_{index}.npz", **arrays)


def _start(method, target, address, count, index):
    join = f"multihost.join(discover=False, coordinator={address!r}, count={count}, "
    code = (
        "from launch import multihost\n"
        + (f"{join}index={index})\n" if count > 1 else "")
        + "from tests.training.test_processes import write\n"
        + f"write({method!r}, {target!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ
        | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
        | {"XLA_FLAGS": device_flags(4 // count)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(method: str, directory: pathlib.Path, count: int) -> list[dict]:
    """What each of `count` processes holds, four devices in all."""
    address = free_address()
    target = str(directory / f"of{count}")
    started = [_start(method, target, address, count, index) for index in range(count)]
    for process in started:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-4000:]
    return [dict(np.load(f"{target}_{index}.npz")) for index in range(count)]


@pytest.mark.full
@pytest.mark.parametrize(("method", "counts"), [("unimatch", (2,)), ("u2pl", (2, 4))])
def test_processes_agree(method, counts, tmp_path):
    """Losses, parameters, statistics, momentum, U2PL's banks; a confusion matrix.

    One device per process is the same to every method: U2PL, which gathers most, is it.
    """
    (one,) = _run(method, tmp_path, 1)
    assert any(np.issubdtype(x.dtype, np.float64) and x.any() for x in one.values())
    for count in counts:
        for held in _run(method, tmp_path, count):
            assert held.keys() == one.keys()
            for name, expected in one.items():
                np.testing.assert_allclose(
                    held[name], expected, rtol=1e-9, atol=1e-9, err_msg=name
                )


def restored_difference(directory: str) -> dict[str, float]:
    """Six steps on four devices; beside them two on 4, two on 2 and two on 8."""
    expected, _ = _wide_run("mean_teacher", 4, steps=6)
    state, shapes = None, []
    for devices in (4, 2, 8):
        state, _ = _wide_run("mean_teacher", devices, steps=2, state=state)
        checkpointer = Checkpointer(pathlib.Path(directory) / str(devices))
        checkpointer.save(state, {}, wait=True)
        like = jax.eval_shape(lambda x: x, state)
        restored = checkpointer.restore_latest(like)
        checkpointer.close()
        assert restored is not None
        state = restored.state
        shapes.append(jax.tree.map(lambda x: x.shape, state))
    assert shapes[0] == shapes[1] == shapes[2]
    return {
        "state": tiny.difference(state, expected),
        "step": int(state.step),
    }


@pytest.mark.full
def test_restored_on_other_numbers_of_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", device_flags(8))
    found = call_x64(
        "tests.training.test_processes", f"restored_difference({str(tmp_path)!r})"
    )
    assert found["step"] == 6
    assert found["state"] < 1e-9, json.dumps(found)
