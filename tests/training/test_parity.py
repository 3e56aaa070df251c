"""What must not depend on devices, mapping, micro-batches or the plug-in's presence."""

import functools
import json
import pathlib
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

from launch.bench.timing import COMPILED, counted
from mpmc_jax.experiments.build import state_shape
from mpmc_jax.models.platform import compiled_for
from mpmc_jax.training.checkpoint.manager import Checkpointer
from mpmc_jax.training.state import PLUGIN, TrainState, to_host
from mpmc_jax.training.train_step import make_keys
from tests.support import tiny
from tests.support.x64 import call_x64
from tests.training.test_compiled_steps import U2PL

# The plug-in trains nothing and weighs nothing: lambda_s = 1, no term of its own.
SILENT = {"mpmc__lambda_s": False, "mpmc__beta": 0.0, "mpmc__labeled_weight": 0.0}


def _trees(state):
    """Everything a step moves, the plug-in's part left out."""
    network = [state.params, state.batch_stats, state.ema_params, state.ema_batch_stats]
    return [
        {k: v for k, v in tree.items() if k != PLUGIN} for tree in network if tree
    ] + [state.opt_state[1].trace["student"]]


def silent_plugin_difference(method: str) -> float:
    """After three steps: MPMC that says nothing against MPMC off."""
    off, _ = tiny.run(tiny.config(f"method={method}"), 3)
    on, _ = tiny.run(tiny.config(f"method={method},mpmc=paper", **SILENT), 3)
    return tiny.difference(_trees(on), _trees(off))


def mapping_difference(
    method: str, kinds=("pmap",), devices=4, mpmc="recommended", **changes
) -> dict[str, float]:
    """Two steps on one device against several, by each mapping."""
    cfg = tiny.config(f"method={method},mpmc={mpmc}", **changes)
    one, metrics = tiny.run(cfg, 2)
    found = {}
    for kind in kinds:
        several, values = tiny.run(cfg, 2, kind=kind, devices=devices)
        found[f"{kind} state"] = tiny.difference(several, one)
        found[f"{kind} values"] = tiny.difference(_counted(values), _counted(metrics))
    return found


def _counted(metrics):
    """Each step's numbers without those that had nothing to be the mean of."""
    return [{k: v for k, v in m.values.items() if not np.isnan(v)} for m in metrics]


def unet_difference() -> dict[str, float]:
    """UniMatch with Dice, live dropout and MPMC on the U-Net: one device, then four."""
    changes = {
        "data__crop": 32,
        "model__name": "unet",
        "mpmc__tap": "auto",
        "method__supervised_loss": "ce_dice",
        "method__unlabeled_loss": "dice",
    }
    return mapping_difference("unimatch", **changes)


def platform_difference() -> dict[str, float]:
    """Two steps with the forms for CPUs against those for GPUs."""
    cfg = tiny.config("method=unimatch,mpmc=recommended")
    on_cpu, metrics = tiny.run(cfg, 2)
    with compiled_for("gpu"):
        on_gpu, values = tiny.run(cfg, 2)
    return {
        "state": tiny.difference(on_gpu, on_cpu),
        "values": tiny.difference(_counted(values), _counted(metrics)),
    }


# What drops branches, recomputes and has another optimizer, beside the methods.
DROPS = {"model__drop_path": 0.3, "model__remat": "all", "optimizer__name": "adamw"}
# Banks are filled by the first step and drawn from by both.
DRAWN = {**U2PL, "u2pl__contrast": "corrected", "u2pl__warmup_epochs": 0}
# MPMC on DPT's last fused map, for one of the methods.
FUSED = {"mpmc__tap": "decoder"}
OF_METHOD = {"mean_teacher": DROPS, "u2pl": DRAWN, "fixmatch": FUSED}


def transformer_settings(method: str, **changes) -> dict:
    """Settings of a run on a tiny transformer, where every pseudo-label counts."""
    return {
        "model__name": "dpt",
        "model__backbone": "shallow_dinov2",
        "data__crop": 32,
        "mpmc__tap": "auto",
        "mpmc__windows": (1, 3),
        "method__threshold": 0.0,
        **OF_METHOD.get(method, {}),
        **changes,
    }


def _x64(call: str):
    return call_x64("tests.training.test_parity", call)


@pytest.mark.full
@pytest.mark.parametrize(
    "method", ["mean_teacher", "unimatch", "augseg", "u2pl", "ael"]
)
def test_a_silent_plugin_moves_nothing(method):
    assert _x64(f"silent_plugin_difference({method!r})") < 1e-12


# The mapping is no method's business: one sees both.
BOTH = {"kinds": ("pmap", "shard_map")}
# One image a group, requests, and a memory that every micro-batch moves.
PARTS = {"devices": 2, "train__accumulation": 2}
# Losses that rank pixels, and thresholds by class.
IMBALANCE = {
    "method__supervised_loss": "focal_lovasz",
    "imbalance__thresholds": (0.2, 0.3, 0.25, 0.2),
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mean_teacher", BOTH),
        ("fixmatch", IMBALANCE),
        ("augseg", {}),
        ("u2pl", DRAWN),
        ("ael", PARTS),
    ],
)
def test_devices_and_mappings_agree(method, changes):
    """UniMatch's turn is on the U-Net, below, and in test_golden.py."""
    found = _x64(f"mapping_difference({method!r}, **{changes!r})")
    kinds = changes.get("kinds", ("pmap",))
    assert set(found) == {
        f"{kind} {what}" for kind in kinds for what in ("state", "values")
    }
    assert np.max(list(found.values())) < 1e-10, json.dumps(found)


@pytest.mark.full
def test_the_forms_for_gpus_make_the_same_steps():
    found = _x64("platform_difference()")
    assert np.max(list(found.values())) < 1e-10, json.dumps(found)


@pytest.mark.full
def test_devices_agree_on_the_unet():
    found = _x64("unet_difference()")
    assert np.max(list(found.values())) < 1e-10, json.dumps(found)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("supervised", {"mpmc": "off"}),
        ("supervised", BOTH),
        ("unimatch_v2", {}),
        ("augseg", {}),
    ],
)
def test_devices_and_mappings_agree_on_a_transformer(method, changes):
    """With MPMC, whose terms are added to those of the method, which are all there."""
    changes_of = transformer_settings(method, **changes)
    found = _x64(f"mapping_difference({method!r}, **{changes_of!r})")
    assert len(found) == (4 if changes == BOTH else 2)
    assert np.max(list(found.values())) < 1e-10, json.dumps(found)


class Resumed(NamedTuple):
    """A run whose second step follows a checkpoint, beside one that went on.

    Attributes:
      loss: of the first step.
      resumed, undisturbed: the states after two steps.
      compiled: programs that resuming compiled.
    """

    loss: float
    resumed: TrainState
    undisturbed: TrainState
    compiled: int


def resume(method: str, mpmc: str, dtype: str, folder: pathlib.Path) -> Resumed:
    """Two steps on a tiny transformer, with a checkpoint between them in `folder`.

    Raises:
      AssertionError: the step was traced more than once.
    """
    chex.clear_trace_counter()
    cfg = tiny.config(
        f"method={method},mpmc={mpmc}",
        **transformer_settings(method, model__dtype=dtype),
    )
    parts = tiny.setup(cfg)
    start = to_host(tiny.init_state(parts, cfg.seed))
    once = functools.partial(chex.assert_max_traces, n=1)
    advance = tiny.stepper(cfg, trace=once)
    first, (metrics,) = advance(start, 1)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(first, {}, wait=True)
        restored = checkpointer.restore_latest(state_shape(parts))
    with counted() as counts:
        resumed, _ = advance(restored.state, 1)
    undisturbed, _ = advance(start, 2)
    loss = float(metrics.values["loss"])
    return Resumed(loss, resumed, undisturbed, counts[COMPILED])


@pytest.mark.full
@pytest.mark.parametrize("method", ["fixmatch", "u2pl"])
def test_half_precision_and_going_on_on_a_transformer(method, tmp_path):
    """A program in bfloat16 is near float32, compiles once, and goes on bit by bit."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        found = resume(method, "recommended", dtype, tmp_path / dtype)
        losses[dtype] = found.loss
        assert found.compiled == 0
        chex.assert_trees_all_equal(found.resumed, found.undisturbed)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)


def _strong(inputs):
    """Every strong view that a method drew."""
    if isinstance(inputs.strong, tuple):
        return [*inputs.strong, *inputs.partner_strong]
    return [inputs.strong]


@pytest.mark.parametrize(
    "method", [pytest.param("mean_teacher", marks=pytest.mark.full), "unimatch"]
)
def test_no_two_examples_draw_the_same(method):
    cfg = tiny.config(f"method={method}")
    parts = tiny.setup(cfg)
    state = tiny.init_state(parts, 0)
    batch = tiny.batch(0, cfg, parts.step.method)
    # The same image everywhere: what differs afterwards was drawn.
    image = np.repeat(batch.unlabeled.image[1:2], 8, axis=0)
    batch = batch.replace(unlabeled=batch.unlabeled.replace(image=image))
    if batch.partner is not None:
        batch = batch.replace(partner=batch.partner.replace(image=image))
    augment = jax.jit(
        lambda state, batch: parts.step.method.augment(
            batch, {}, make_keys(parts.step, state, batch)
        )
    )
    inputs = augment(state, batch)
    views = np.concatenate(_strong(inputs))
    # Some views are the image itself (no jitter, no gray, no blur: 1 in 13); the
    # others must all differ.
    plain = np.abs(views - np.asarray(inputs.weak[:1])).max(axis=(1, 2, 3)) < 1e-6
    changed = views[~plain].reshape((~plain).sum(), -1)
    assert len(changed) >= 4
    assert len(np.unique(changed, axis=0)) == len(changed)
    masks = inputs.perturbation.values() if method == "unimatch" else ()
    # Of 8 channels, two of 16 examples draw the same by chance every third time.
    wide = [np.asarray(mask)[:, 0, 0] for mask in masks if mask.shape[-1] >= 32]
    assert bool(wide) == (method == "unimatch")
    for flat in wide:
        assert len(np.unique(flat, axis=0)) == len(flat)
    later = augment(state.replace(step=state.step + 1), batch)
    assert not np.array_equal(_strong(later)[0], _strong(inputs)[0])
    again = augment(state, batch)
    np.testing.assert_array_equal(_strong(again)[0], _strong(inputs)[0])
