"""Analysis has the lambda of training: its teacher, its head, its field.

That is row D24 of docs/deviations.md.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.analysis import pseudo_label_maps
from mpmc_jax.data.build import build_split
from mpmc_jax.data.dataset import open_dataset
from mpmc_jax.experiments.evaluation import make_probe_builder
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.pixels import RGB
from mpmc_jax.plugins.mpmc.plugin import MPMC
from mpmc_jax.training import train_step
from mpmc_jax.training.state import variables_of
from mpmc_jax.training.train_step import make_keys
from tests.support import tiny
from tests.support.data_sets import config_for, prepare_synthetic

NETWORKS = {
    "deeplabv3plus": {},
    "unet": {"model__name": "unet", "mpmc__tap": "auto", "data__crop": 32},
}


@dataclasses.dataclass(frozen=True)
class Noting(MPMC):
    """MPMC that notes the views which it refined."""

    noted: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def refine(self, *args, **kwargs):
        views, targets = super().refine(*args, **kwargs)
        self.noted.extend(views)
        return views, targets


def _noting(parts):
    fields = {
        field.name: getattr(parts.step.plugin, field.name)
        for field in dataclasses.fields(MPMC)
    }
    plugin = Noting(**fields)
    return plugin, dataclasses.replace(parts.step, plugin=plugin)


def _trained(parts, state, batch):
    """The pseudo-labels and lambda_s of a training step's view of `batch`."""
    plugin, config = _noting(parts)

    def run(state, batch):
        keys = make_keys(config, state, batch)
        inputs = config.method.augment(batch, state.method_state, keys)
        regions = config.method.regions(inputs)
        counts = {k: region.valid.sum() for k, region in regions.items()}
        totals = Reduction(None, counts | plugin.counts(regions))
        carry = train_step.Carry(
            grads=jax.tree.map(jnp.zeros_like, state.params),
            batch_stats=state.batch_stats,
            ema_batch_stats=state.ema_batch_stats,
            method_state=state.method_state,
        )
        train_step.micro_step(config, state, carry, inputs, totals)
        (view,) = plugin.noted
        return view.target, view.weight

    return jax.jit(run)(state, batch)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("deeplabv3plus", "student"),
        pytest.param("unet", "student", marks=pytest.mark.full),
        ("deeplabv3plus", "ema"),
    ],
)
def test_analysis_weighs_a_prediction_as_training_weighs_the_pseudo_label(name, head):
    cfg = tiny.config(
        "method=mean_teacher,mpmc=paper",
        method__cutmix=False,
        method__threshold=0.0,
        mpmc__teacher_head=head,
        mpmc__lambda_scale="max",
        train__batch_size=2,
        **NETWORKS[name],
    )
    parts = tiny.setup(cfg, axis_name=None)
    state = tiny.init_state(parts, cfg.seed)
    # An average that is neither the student's network nor its head.
    noise = np.random.default_rng(0)
    state = state.replace(
        ema_params=jax.tree.map(
            lambda x: x + 0.3 * noise.normal(size=x.shape).astype(x.dtype),
            state.ema_params,
        )
    )
    batch = jax.tree.map(jnp.asarray, tiny.batch(0, cfg, parts.step.method))
    whole = jnp.tile(jnp.asarray([0, 0, cfg.data.crop, cfg.data.crop]), (2, 1))
    batch = batch.replace(unlabeled=batch.unlabeled.replace(extent=whole))
    target, weight = _trained(parts, state, batch)

    run = types.SimpleNamespace(
        config=cfg,
        facts=types.SimpleNamespace(pixels=RGB),
        module=parts.step.modules["student"],
        variables=variables_of(state, "student", averaged=True),
        plugin=parts.step.plugin,
        probe=make_probe_builder(parts)(state),
    )
    images = batch.unlabeled.image
    found = pseudo_label_maps.pseudo_label_function(run)(
        images, jnp.zeros(images.shape[:3], int)
    )
    np.testing.assert_array_equal(found.label, target)
    assert np.std(weight) > 1e-3
    np.testing.assert_allclose(found.weight, weight, rtol=1e-5)


def test_unlabeled_images_are_those_of_the_lists_that_the_run_wrote(tmp_path):
    """Those of its settings may have changed since, or be gone."""
    prepare_synthetic(tmp_path / "data")
    info = open_dataset(str(tmp_path / "data"), "synthetic")
    config = config_for(tmp_path / "data")
    config.data.allow_absent_classes = True
    for name, ids in (
        ("labeled", info.ids["train"][:4]),
        ("un", info.ids["train"][4:]),
    ):
        (tmp_path / name).write_text("\n".join(ids))
    config.data.labeled_ids, config.data.unlabeled_ids = (
        str(tmp_path / name) for name in ("labeled", "un")
    )
    run = types.SimpleNamespace(config=config)
    split = build_split(config, info)
    split.save(tmp_path / "run" / "splits")
    (tmp_path / "un").write_text("\n".join(info.ids["train"][5:]))
    found = pseudo_label_maps.unlabeled_ids(run, tmp_path / "run", info)
    assert found == set(info.ids["train"][4:])
    (tmp_path / "labeled").unlink()
    assert pseudo_label_maps.unlabeled_ids(run, tmp_path / "run", info) == found
    (tmp_path / "run" / "splits" / "unlabeled.txt").unlink()
    with pytest.raises(FileNotFoundError, match="labeled: no such id list"):
        pseudo_label_maps.unlabeled_ids(run, tmp_path / "run", info)
