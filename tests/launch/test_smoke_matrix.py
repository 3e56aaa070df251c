"""Every method with and without MPMC learns one batch, compiles once, keeps to bf16."""

import numpy as np
import pytest

from configs import presets
from launch.bench import smoke_matrix
from launch.bench.methods import bench_methods, images_passed
from mpmc_jax.experiments.build import init_state
from mpmc_jax.experiments.step_program import noise_setup
from tests.support import tiny
from tests.training.test_compiled_steps import U2PL


def _config(method, mpmc, **changes):
    argument = f"method={method},mpmc={mpmc}"
    return tiny.config(
        argument,
        train__batch_size=smoke_matrix.batch_size(method),
        train__devices=1,
        # AEL's loss is OHEM's; all of these few pixels are kept.
        method__ohem_min_kept=100_000,
        **(U2PL if method == "u2pl" else {}),
        **changes,
    )


# The others learn without MPMC as with it: in test_parity.py a plug-in that weighs
# nothing changes nothing, for all kinds of views that there are.
COMBINATIONS = [(method, "recommended") for method in presets.METHODS]
COMBINATIONS += [("supervised", "off")]


@pytest.mark.full
@pytest.mark.parametrize(("method", "mpmc"), COMBINATIONS)
def test_a_combination_learns_its_batch(method, mpmc):
    cfg = _config(method, mpmc)
    parts = tiny.setup(cfg)
    batch = tiny.batch(1, cfg, parts.step.method)
    state = init_state(parts, cfg.seed)
    count = smoke_matrix.FROM + 2
    values, compiles, kept = smoke_matrix.steps_on(cfg, parts, batch, state, count)
    losses = smoke_matrix.supervised_losses(values)
    assert np.mean(losses[-5:]) <= smoke_matrix.MOST_RATIO * losses[0]
    epochs = range(count // tiny.STEPS_PER_EPOCH)
    phases = {parts.step.method.phase(epoch) for epoch in epochs}
    assert compiles == len(phases) == (2 if method == "u2pl" else 1)
    if mpmc == "off":
        return
    half = _config(method, mpmc, model__dtype="bfloat16")
    low, *_ = smoke_matrix.steps_on(
        half, tiny.setup(half), batch, kept[smoke_matrix.FROM], 2
    )
    for one, other in zip(low, values[smoke_matrix.FROM :], strict=True):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0.05)


def test_the_table_has_a_row_a_combination():
    line = dict.fromkeys(smoke_matrix.COLUMNS, 0.12345) | {"method": "ael"}
    rows = smoke_matrix.table([line, line]).splitlines()
    assert len(rows) == 4 and rows[2].startswith("| ael | 0.123 |")


def test_a_combination_that_misses_a_bound_is_named():
    line = {"method": "ael", "mpmc": "off", "ratio": 0.7, "bfloat16": 0.05}
    line |= {"phases": 1, "compiles": 1}
    assert not smoke_matrix.missed(line)
    changes = {"ratio": 0.71, "compiles": 2, "bfloat16": float("nan")}
    for name, value in changes.items():
        (text,) = smoke_matrix.missed(line | {name: value})
        assert text.startswith("ael, mpmc=off: ")


@pytest.mark.full
def test_methods_are_timed_beside_the_mean_teacher():
    configs = {name: _config(name, "off") for name in ("mean_teacher", "augseg")}
    found = bench_methods(configs, 1)
    assert found["mean_teacher"]["time_ratio"] == 1
    assert 0.8 < found["augseg"]["flops_ratio"] < 1.3
    assert 0.8 < found["augseg"]["passes_ratio"] < 1.3
    assert found["augseg"]["time_ratio"] > 0


@pytest.mark.parametrize(
    "method, teacher, student",
    [
        # For two labeled images, four of AEL's; UniMatch decodes clean and perturbed
        # features.
        ("supervised", (0, 0), (2, 2)),
        ("mean_teacher", (2, 2), (4, 4)),
        ("unimatch", (2, 2), (8, 12)),
        ("u2pl", (6, 6), (4, 4)),
        ("ael", (8, 8), (6, 6)),
    ],
)
def test_passes_are_counted(method, teacher, student):
    cfg = _config(method, "off")
    counted = images_passed(cfg, noise_setup(cfg, axis_name=None))
    found = [(each["encode"], each["decode"]) for each in counted]
    assert found == [teacher, student]
