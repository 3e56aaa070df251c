"""Two whole UniMatch steps, through the project's own step, against published ones."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.methods.unimatch import Inputs, UniMatch
from mpmc_jax.models import ModelConfig, build_segmenter, load_torch_state_dict
from mpmc_jax.plugins.base import Identity
from mpmc_jax.training import objective, train_step
from mpmc_jax.training.config import AXIS, StepConfig
from mpmc_jax.training.optimizer import Schedule, build_optimizer
from mpmc_jax.training.parallel import Layout, Parallel
from mpmc_jax.training.state import TrainState
from tests.support import golden
from tests.support.x64 import run_x64

STEPS = "unimatch_step_*.npz"
TERMS = {"loss": "loss", "loss_supervised": "loss_x", "loss_s1": "loss_s1"} | {
    "loss_s2": "loss_s2",
    "loss_fp": "loss_fp",
    "confident_weak": "confident",
}


def _inputs(arrays: dict) -> Inputs:
    real = arrays["ignore"] != 255
    return Inputs(
        image=arrays["img_x"],
        label=arrays["labels_x"],
        weak=arrays["img_u_w"],
        real=real,
        strong=(arrays["img_u_s1"], arrays["img_u_s2"]),
        partner_weak=arrays["mix_u_w"],
        partner_real=arrays["ignore_mix"] != 255,
        partner_strong=(arrays["mix_u_s1"], arrays["mix_u_s2"]),
        masks=(arrays["box1"], arrays["box2"]),
        # The identity, still decoded as a second half of the batch.
        perturbation={
            "layer1": jnp.ones((2 * real.shape[0], 1, 1, 256), real.dtype),
            "layer4": jnp.ones((2 * real.shape[0], 1, 1, 2048), real.dtype),
        },
    )


def _arrays(file, number: int, dtype) -> dict[str, np.ndarray]:
    """One step's inputs, channels last."""
    found = {}
    for name in file.files:
        match = re.fullmatch(rf"((?:img|mix|labels|ignore|box).*)_{number}", name)
        if match is None:
            continue
        value = file[name]
        if value.ndim == 4:
            value = value.transpose(0, 2, 3, 1).astype(dtype)
        found[match[1]] = value
    return found


def _step_config(file, model: ModelConfig, devices: int, batch: int) -> StepConfig:
    schedule = Schedule(lr=1e-3, steps=1, power=0.0)
    min_kept = int(file["ohem_min_kept"])
    return StepConfig(
        method=UniMatch(
            perturbed_taps=(("layer1", 256), ("layer4", 2048)),
            threshold=float(file["conf_thresh"]),
        ),
        plugin=Identity(),
        modules={"student": build_segmenter(model, axis_name=AXIS)},
        teacher_modules={"student": build_segmenter(model, axis_name=AXIS)},
        optimizer=build_optimizer(
            schedule, head_multiplier=10.0, momentum=0.9, weight_decay=1e-4
        ),
        schedule=schedule,
        supervised_loss=objective.SupervisedLoss(
            name="ohem" if min_kept else "ce",
            group_size=batch // devices,
            threshold=float(file["ohem_thresh"]),
            min_kept=min_kept,
        ),
        batch_size=batch,
        group_size=batch // devices,
        micro_batches=1,
        steps_per_epoch=1,
    )


def errors(path, devices: int, dtype) -> dict[str, float]:
    """Worst relative errors of two steps by kind of number."""
    file = np.load(path)
    model = ModelConfig(
        backbone=str(file["arch"]), num_classes=int(file["num_classes"])
    )
    recipe = golden.recipe_of(model, dtype)
    variables = load_torch_state_dict(recipe, model)
    first = _arrays(file, 0, dtype)
    batch = first["img_x"].shape[0]
    config = _step_config(file, model, devices, batch)
    params = {"student": variables["params"]}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={"student": variables["batch_stats"]},
        ema_params=None,
        ema_batch_stats=None,
        opt_state=config.optimizer.init(params),
        method_state={},
        key=jax.random.key_data(jax.random.key(0)),
    )
    parallel = Parallel("pmap", Layout(batch, batch // devices, 1), devices)

    def per_device(state, arrays, order):
        stacked = jax.tree.map(lambda x: x[None], arrays)
        return train_step.train_step(config, state, stacked, _inputs, order)

    run = parallel.compile(per_device)
    on_device = parallel.replicate(state)
    worst = {}
    for number in (0, 1):
        placed = parallel.place(_arrays(file, number, dtype))
        order = parallel.replicate(train_step.make_step_info(number))
        on_device, metrics = run(on_device, placed, order)
        values = parallel.fetch(metrics).values
        found = {name: float(values[name]) for name in TERMS}
        errors = [
            abs(found[ours] / float(file[f"{theirs}_{number}"]) - 1)
            for ours, theirs in TERMS.items()
        ]
        worst[f"losses_{number}"] = float(np.max(errors))
    return worst | _changes(file, model, parallel.fetch(on_device), recipe)


def _changes(file, model, state: TrainState, recipe) -> dict[str, float]:
    """Errors of norms and of distances from the start."""
    found = golden.by_torch_name(
        model,
        {
            "params": state.params["student"],
            "batch_stats": state.batch_stats["student"],
        },
    )
    start = golden.by_torch_name(model, load_torch_state_dict(recipe, model))
    assert set(found) == set(file["names"])
    worst = {"norms": 0.0, "changes_params": 0.0, "changes_stats": 0.0}
    for name, norm, change in zip(
        file["names"], file["norms"], file["change_norms"], strict=True
    ):
        now = np.asarray(found[name], np.float64)
        before = np.asarray(start[name], np.float64)
        kind = "changes_stats" if "running" in name else "changes_params"
        error = abs(np.linalg.norm(now - before) / change - 1)
        worst[kind] = float(np.maximum(worst[kind], error))
        error = abs(np.linalg.norm(now) / norm - 1)
        worst["norms"] = float(np.maximum(worst["norms"], error))
    return worst


def all_errors(dtype, devices: int) -> dict[str, float]:
    """The worst over every file of the kind."""
    worst: dict[str, float] = {}
    for path in golden.golden_files(STEPS):
        for name, value in errors(path, devices, dtype).items():
            worst[name] = float(np.maximum(value, worst.get(name, 0.0)))
    return worst


@pytest.mark.full
def test_two_steps_agree_in_float64_on_two_devices():
    golden.golden_files(STEPS)  # skips here, not in the other process
    worst = run_x64(
        "import json, numpy as np\nimport tests.training.test_golden as t\n"
        "print(json.dumps(t.all_errors(np.float64, 2)))"
    )
    assert len(worst) == 5
    assert np.max(list(worst.values())) < 1e-8, worst


@pytest.mark.full
def test_two_steps_agree_in_float32():
    with jax.default_matmul_precision("highest"):
        worst = all_errors(np.float32, 1)
    print(json.dumps(worst))
    assert worst["losses_0"] < 1e-5
    assert worst["losses_1"] < 1e-3
    assert worst["changes_params"] < 2e-2
    assert worst["changes_stats"] < 5e-5
