"""UniMatch V2 on a vision transformer: whole steps against an oracle in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.models.encoders import vit
from mpmc_jax.training.parallel import Layout
from mpmc_jax.training.train_step import make_keys
from tests.support import tiny
from tests.support import unimatch_v2_oracle as oracle
from tests.support.x64 import call_x64

STEPS, GROUP_SIZE = 3, 4
CHANGES = {
    "model__name": "dpt",
    "model__backbone": "tiny_dinov2",
    # Positions are resized: four patches a side instead of five.
    "data__crop": 32,
    "train__group_size": GROUP_SIZE,
    # Some pixels are confident, and the third step meets the largest decay.
    "method__threshold": 0.28,
    "method__ema_decay": 0.6,
    "optimizer__name": "adamw",
    "optimizer__lr": 1e-4,
    "optimizer__head_multiplier": 40.0,
    "optimizer__weight_decay": 0.1,
}


def _recipe(cfg):
    spec = vit.BACKBONES[cfg.model.backbone]
    return oracle.Recipe(
        patch=spec.family.patch,
        heads=spec.heads,
        depth=spec.depth,
        grid=spec.family.grid,
        epsilon=spec.family.epsilon,
        offset=spec.family.offset,
        group_size=GROUP_SIZE,
        threshold=cfg.method.threshold,
        decay=cfg.method.ema_decay,
        lr=cfg.optimizer.lr,
        head_multiplier=cfg.optimizer.head_multiplier,
        weight_decay=cfg.optimizer.weight_decay,
        steps=cfg.train.steps,
    )


def _checked_masks(masks):
    """(2b,d) multipliers, after what the specification says of them."""
    first, *others = masks.values()
    # The same for all four levels.
    assert all(np.array_equal(first, other) for other in others) and len(others) == 3
    one, two = np.split(np.asarray(first)[:, 0, 0], 2)
    np.testing.assert_array_equal(one + two, 2)
    kept = (one == 1).all(-1)
    assert np.isin(one[~kept], (0, 2)).all()
    np.testing.assert_array_equal(kept.reshape(-1, GROUP_SIZE).sum(1), GROUP_SIZE // 2)
    return np.concatenate([one, two])


def differences() -> dict[str, float]:
    """Largest differences of three steps to the oracle's, relative to 1 + |value|."""
    cfg = tiny.config("method=unimatch_v2", **CHANGES)
    parts = tiny.setup(cfg, axis_name=None)
    start = tiny.wide(tiny.init_state(parts, cfg.seed))
    state, metrics = tiny.run(cfg, STEPS, state=start)
    trainer = oracle.Trainer(start.params["student"], _recipe(cfg))
    order = Layout(cfg.train.batch_size, GROUP_SIZE, 1).order(
        cfg.train.batch_size, 1, 1
    )

    @jax.jit
    def augment(number, rows):
        keys = make_keys(parts.step, start.replace(step=number), rows)
        return parts.step.method.augment(rows, {}, keys)

    terms = []
    for number in range(STEPS):
        batch = tiny.batch(number, cfg, parts.step.method)
        rows = jax.tree.map(lambda x: x[order], batch)
        inputs = augment(jnp.asarray(number), rows)
        draws = oracle.Draws(
            inputs.strong, inputs.masks, _checked_masks(inputs.perturbation)
        )
        terms.append(trainer.step(rows, draws))
    for each in terms:
        assert 0.02 < each["confident_weak"] < 0.98 and each["loss_s1"] > 0, each
    found = [{k: m.values[k] for k in t} for m, t in zip(metrics, terms, strict=True)]
    return {
        "terms": tiny.difference(found, terms),
        "student": tiny.difference(state.params["student"], trainer.params),
        "teacher": tiny.difference(state.ema_params["student"], trainer.teacher),
        "moved": tiny.difference(trainer.params, start.params["student"]),
        "apart": tiny.difference(trainer.params, trainer.teacher),
    }


@pytest.mark.full
def test_whole_steps_equal_the_specification_in_float64():
    found = call_x64("tests.methods.test_unimatch_v2", "differences()")
    # The steps did something.
    assert found.pop("moved") > 1e-2 and found.pop("apart") > 1e-3
    assert max(found.values()) < 1e-8, found
