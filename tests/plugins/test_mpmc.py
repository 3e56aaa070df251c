import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax import losses
from mpmc_jax.losses.reduction import Reduction
from mpmc_jax.models.pooling import multi_scale_pool
from mpmc_jax.plugins import Identity, mpmc
from mpmc_jax.plugins.mpmc import adaptive_weights, patch_targets, real_patches
from mpmc_jax.plugins.mpmc.patches import nearest_patch
from mpmc_jax.types import Region, Supervised
from tests.support.plugin_fakes import (
    CLASSES,
    COEFFICIENTS,
    DEPTH,
    FIELD,
    PLUGIN,
    SIDE,
    SIZE,
    fill,
    make_view,
    network,
    region,
)


@pytest.fixture(scope="module")
def inputs():
    """Variables of a trained-looking head, a labeled part and three views."""
    teacher = network().replace(train=True)
    rng = np.random.default_rng(7)
    taps = {"layer1": jnp.asarray(rng.normal(size=(2, *SIZE, DEPTH)), jnp.float32)}
    one = {"layer1": taps["layer1"][:1]}
    variables = fill(jax.eval_shape(lambda: PLUGIN.init(jax.random.key(1), one)), 1)
    label = rng.integers(0, CLASSES, (2, SIDE, SIDE))
    where = region(3)
    supervised = Supervised(
        logits=jnp.zeros((2, SIDE, SIDE, CLASSES)),
        taps=taps,
        # As a base method that labels its padding 0 would hand it over (row D7 of
        # docs/deviations.md).
        label=jnp.asarray(np.where(where.real, label, 0), jnp.int32),
        region=where,
    )
    names = enumerate(COEFFICIENTS, start=10)
    views = tuple(make_view(name, seed, teacher) for seed, name in names)
    return variables, supervised, views


def run(plugin, inputs, active=None):
    variables, supervised, views = inputs
    regions = {"supervised": supervised.region, **{v.name: v.region for v in views}}
    reduction = Reduction(counts=plugin.counts(regions))
    refined, targets = plugin.refine(variables, views, reduction, active)
    out = plugin.losses(variables, (supervised,), refined, targets, reduction)
    return refined, targets, *out


def teacher_logits(variables, views):
    """Of all views at once: rounding depends on how many images a pass has."""
    images = jnp.concatenate([view.image for view in views])
    z = views[0].teacher.frozen().tap_map(images, "layer1")
    logits = PLUGIN.classifier().apply(variables, z, train=False)
    return jnp.split(logits, len(views))


def mean(pair):
    return pair[0] / pair[1]


def test_refine_multiplies_unlabeled_weights_by_lambda_s(inputs):
    variables, _, views = inputs
    refined, targets, *_ = run(PLUGIN, inputs)
    assert [view.name for view in refined] == list(COEFFICIENTS)
    assert set(targets) == {"s1", "fp"}
    joint = teacher_logits(variables, views[:2])
    for view, before, logits in zip(refined[:2], views[:2], joint, strict=True):
        lambda_s, lambda_m = adaptive_weights(
            logits, before.target, confidence="softmax_prob", scale="none", field=FIELD
        )
        np.testing.assert_allclose(view.weight, before.weight * lambda_s, rtol=1e-6)
        np.testing.assert_allclose(targets[view.name].weight, lambda_m, rtol=1e-6)
        q = jax.nn.sigmoid(logits)
        np.testing.assert_allclose(targets[view.name].target, q, rtol=1e-6)
        assert (view.logits == before.logits).all()
    # AEL's consistency on labeled images keeps its weights (D20).
    assert refined[2] is views[2]


def test_losses_are_equations_4_and_6(inputs):
    variables, supervised, views = inputs
    _, targets, terms, metrics, moved = run(PLUGIN, inputs)
    # The head sees all parts in one batch (D17).
    parts = [part.taps["layer1"] for part in (supervised, *views[:2])]
    logits, stats = PLUGIN.classifier().apply(
        variables, jnp.concatenate(parts), train=True, mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, moved, stats["batch_stats"])
    label = jnp.where(supervised.region.real, supervised.label, 255)
    target, valid = patch_targets(label, CLASSES, FIELD)
    assert not valid.all()
    labeled = losses.asymmetric_focal_loss(logits[:2], target, where=valid)
    np.testing.assert_allclose(terms["patch_labeled"], labeled, rtol=1e-6)
    np.testing.assert_allclose(mean(metrics["loss_patch_labeled"]), labeled, rtol=1e-6)
    unlabeled = 0
    for i, view in enumerate(views[:2]):
        taught = targets[view.name]
        loss = losses.binary_cross_entropy(
            logits[2 + 2 * i : 4 + 2 * i],
            taught.target,
            weights=taught.weight,
            where=real_patches(view.region.real, FIELD),
        )
        unlabeled += COEFFICIENTS[view.name] / 3 * loss  # D18: as L_u weighs them
    np.testing.assert_allclose(terms["patch_unlabeled"], 0.15 * unlabeled, rtol=1e-6)
    logged = mean(metrics["loss_patch_unlabeled"])
    np.testing.assert_allclose(logged, unlabeled, rtol=1e-6)
    right = ((logits[:2] > 0) == target)[np.asarray(valid)].mean()
    np.testing.assert_allclose(mean(metrics["patch_hamming"]), right, rtol=1e-6)


def test_lambda_mean_is_over_confident_pixels(inputs):
    _, _, views = inputs
    refined, _, _, metrics, _ = run(PLUGIN, inputs)
    weights = np.stack([view.weight for view in refined[:2]])
    confident = np.stack([(v.weight > 0) & v.region.valid for v in views[:2]])
    expected = weights[confident].mean()
    np.testing.assert_allclose(mean(metrics["lambda_mean"]), expected, rtol=1e-6)
    assert 1 / (1 + 3 * np.e) < expected < np.e / (np.e + 3)
    scaled = dataclasses.replace(PLUGIN, lambda_scale="mean")
    _, _, _, metrics, _ = run(scaled, inputs)
    np.testing.assert_allclose(mean(metrics["lambda_mean"]), 1, rtol=1e-6)


def test_every_ablation_leaves_out_its_part_alone(inputs):
    variables, supervised, views = inputs
    refined, targets, terms, _, _ = run(PLUGIN, inputs)

    def ablate(**parts):
        return run(dataclasses.replace(PLUGIN, **parts), inputs)

    assert set(ablate(labeled=False)[2]) == {"patch_unlabeled"}
    _, _, only_labeled, _, moved = ablate(unlabeled=False)
    assert set(only_labeled) == {"patch_labeled"}
    # Batch norm sees the unlabeled images all the same (D17).
    taps = [part.taps["layer1"] for part in (supervised, *views[:2])]
    _, stats = PLUGIN.classifier().apply(
        variables, jnp.concatenate(taps), train=True, mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, moved, stats["batch_stats"])
    plain, _, same_terms, metrics, _ = ablate(lambda_s=False)
    for view, before in zip(plain, views, strict=True):
        np.testing.assert_array_equal(view.weight, before.weight)
    assert mean(metrics["lambda_mean"]) == 1
    assert same_terms == terms
    same, even, _, _, _ = ablate(lambda_m=False)
    assert all((target.weight == 1).all() for target in even.values())
    np.testing.assert_array_equal(same[0].weight, refined[0].weight)
    hard = ablate(target="hard")[1]["s1"].target
    np.testing.assert_array_equal(hard, targets["s1"].target >= 0.5)


def test_warm_up_trains_on_labels_alone(inputs):
    _, _, views = inputs
    refined, _, terms, metrics, _ = run(PLUGIN, inputs, active=jnp.asarray(False))
    # Nothing is counted of a term that does not act.
    assert metrics["loss_patch_unlabeled"] == (0, 0)
    for view, before in zip(refined, views, strict=True):
        np.testing.assert_array_equal(view.weight, before.weight)
    _, _, later, _, _ = run(PLUGIN, inputs)
    assert terms["patch_unlabeled"] == 0
    assert terms["patch_labeled"] == later["patch_labeled"] > 0
    _, _, active, _, _ = run(PLUGIN, inputs, active=jnp.asarray(True))
    assert active == later


@partial(jax.jit, static_argnums=0)
def gradients(plugin, variables, supervised, views):
    """Of all terms by the head, by the labeled taps and by the views' taps."""

    def total(params, supervised_taps, view_taps):
        head = {**variables, "params": params}
        parts = [v.replace(taps=t) for v, t in zip(views, view_taps, strict=True)]
        labeled = supervised.replace(taps=supervised_taps)
        _, _, terms, _, _ = run(plugin, (head, labeled, tuple(parts)))
        return sum(terms.values())

    return jax.grad(total, argnums=(0, 1, 2))(
        variables["params"], supervised.taps, [view.taps for view in views]
    )


def test_gradients_reach_the_head_and_the_taps(inputs):
    head, labeled, views = gradients(PLUGIN, *inputs)
    assert all(np.any(g) for g in jax.tree.leaves(head))
    assert np.any(labeled["layer1"])
    assert [np.any(taps["layer1"]) for taps in views] == [True, True, False]


@pytest.mark.parametrize("detach, labeled_too", [("labeled", True), ("all", False)])
def test_a_detached_head_learns_and_leaves_the_network_alone(
    inputs, detach, labeled_too
):
    """D26: "labeled" trains the network by eq. 6 alone."""
    whole = gradients(PLUGIN, *inputs)
    plugin = dataclasses.replace(PLUGIN, detach=detach)
    head, labeled, views = gradients(plugin, *inputs)
    jax.tree.map(np.testing.assert_array_equal, head, whole[0])
    assert not np.any(labeled["layer1"])
    for found, before in zip(views, whole[2], strict=True):
        expected = before["layer1"] if labeled_too else jnp.zeros_like(found["layer1"])
        np.testing.assert_array_equal(found["layer1"], expected)


def test_shuffled_weights_are_those_of_the_confident_pixels_of_a_class(inputs):
    _, _, views = inputs
    plain, _ = run(PLUGIN, inputs)[:2]
    shuffled, targets = run(dataclasses.replace(PLUGIN, shuffle=True), inputs)[:2]
    for before, found, given in zip(plain[:2], shuffled[:2], views[:2], strict=True):
        confident = np.asarray((given.weight > 0) & given.region.valid)
        assert np.any(np.asarray(before.weight) != np.asarray(found.weight))
        # The view's own weight stays where it is, and lambda_s moves.
        lambdas = [
            np.divide(view.weight, given.weight, where=confident, out=None)
            for view in (before, found)
        ]
        for image, label in np.ndindex(len(confident), CLASSES):
            where = confident[image] & (np.asarray(given.target[image]) == label)
            of_class = [np.sort(each[image][where]) for each in lambdas]
            np.testing.assert_allclose(*of_class, rtol=1e-5)


def test_a_uniform_lambda_is_the_mean_over_the_confident_pixels(inputs):
    _, _, views = inputs
    plain, _, _, metrics, _ = run(PLUGIN, inputs)
    uniform = dataclasses.replace(PLUGIN, uniform=True)
    found, _, _, same, _ = run(uniform, inputs)
    for before, after, given in zip(plain[:2], found[:2], views[:2], strict=True):
        confident = np.asarray((given.weight > 0) & given.region.valid)
        lambdas = np.asarray(before.weight)[confident] / given.weight[confident]
        expected = np.asarray(given.weight) * lambdas.mean()
        np.testing.assert_allclose(after.weight, expected, rtol=1e-5)
    np.testing.assert_allclose(
        mean(same["lambda_mean"]), mean(metrics["lambda_mean"]), rtol=1e-5
    )


def test_a_gate_admits_the_classes_that_the_head_does_not_deny(inputs):
    variables, _, views = inputs
    joint = teacher_logits(variables, views[:2])
    gate = float(np.median(jax.nn.sigmoid(jnp.concatenate(joint))))
    refined, targets, *_ = run(dataclasses.replace(PLUGIN, gate=gate), inputs)
    _, paper, *_ = run(PLUGIN, inputs)
    row = nearest_patch(SIDE, SIZE[0], FIELD)
    for view, before, logits in zip(refined[:2], views[:2], joint, strict=True):
        q_bhwc = np.asarray(jax.nn.sigmoid(logits))[:, row][:, :, row]
        target = np.asarray(before.target)
        of_class = np.take_along_axis(
            q_bhwc, np.clip(target, 0, CLASSES - 1)[..., None], axis=-1
        )
        admitted = (of_class[..., 0] >= gate) & (target < CLASSES)
        assert 0 < admitted.mean() < 1
        np.testing.assert_array_equal(view.weight, before.weight * admitted)
        # The patches' own weights are the paper's.
        np.testing.assert_array_equal(
            targets[view.name].weight, paper[view.name].weight
        )
        seen = dataclasses.replace(PLUGIN, gate=gate).weigh_pixels(logits, target)
        np.testing.assert_array_equal(seen, admitted)
    everyone, *_ = run(dataclasses.replace(PLUGIN, gate=1e-9), inputs)
    known = np.asarray(views[0].target) < CLASSES
    np.testing.assert_array_equal(everyone[0].weight, views[0].weight * known)


def test_temperature_divides_the_logits_of_gamma_alone(inputs):
    variables, _, views = inputs
    plugin = dataclasses.replace(PLUGIN, temperature=0.25)
    refined, targets, *_ = run(plugin, inputs)
    _, paper, *_ = run(PLUGIN, inputs)
    joint = teacher_logits(variables, views[:2])
    for view, before, logits in zip(refined[:2], views[:2], joint, strict=True):
        lambda_s, lambda_m = adaptive_weights(
            4 * logits,
            before.target,
            confidence="softmax_prob",
            scale="none",
            field=FIELD,
        )
        np.testing.assert_allclose(view.weight, before.weight * lambda_s, rtol=1e-6)
        np.testing.assert_allclose(targets[view.name].weight, lambda_m, rtol=1e-6)
        np.testing.assert_array_equal(
            targets[view.name].target, paper[view.name].target
        )
        np.testing.assert_allclose(
            plugin.weigh_pixels(logits, before.target), lambda_s, rtol=1e-6
        )


def test_zero_weights_leave_the_network_untouched(inputs):
    silent = dataclasses.replace(PLUGIN, beta=0.0, labeled_weight=0.0, lambda_s=False)
    for leaf in jax.tree.leaves(gradients(silent, *inputs)):
        assert not np.any(leaf)


def test_the_teacher_gets_no_gradient(inputs):
    variables, supervised, views = inputs

    def weight(variables, images):
        taught = tuple(v.replace(image=i) for v, i in zip(views, images, strict=True))
        refined, targets = PLUGIN.refine(variables, taught, Reduction(), None)
        parts = [view.weight.sum() for view in refined]
        return sum(parts) + targets["s1"].target.sum() + targets["s1"].weight.sum()

    found = jax.grad(weight, argnums=(0, 1))(variables, [v.image for v in views])
    assert not any(np.any(g) for g in jax.tree.leaves(found))


def test_an_all_void_batch_costs_nothing(inputs):
    variables, supervised, views = inputs
    nothing = Region(*[jnp.zeros((2, SIDE, SIDE), bool)] * 2)
    void = (
        variables,
        supervised.replace(region=nothing),
        tuple(view.replace(region=nothing) for view in views),
    )
    _, _, terms, _, _ = run(PLUGIN, void)
    assert terms == {"patch_labeled": 0, "patch_unlabeled": 0}
    for leaf in jax.tree.leaves(gradients(PLUGIN, *void)):
        assert not np.any(leaf)


def test_micro_batches_add_up_to_the_batch(inputs):
    """Terms divide by the counts of the whole batch; the head's statistics do not."""
    variables, supervised, views = inputs
    regions = {"supervised": supervised.region, **{v.name: v.region for v in views}}
    counts = jax.tree.map(lambda n: 2 * n, PLUGIN.counts(regions))
    reduction = Reduction(counts=counts, micro_batches=2)
    refined, targets = PLUGIN.refine(variables, views, reduction, None)
    _, _, whole, _, _ = run(PLUGIN, inputs)
    half, metrics, _ = PLUGIN.losses(
        variables, (supervised,), refined, targets, reduction
    )
    for name, term in half.items():
        np.testing.assert_allclose(term, whole[name] / 2, rtol=1e-6)
    # A micro-batch reports its own mean.
    logged = mean(metrics["loss_patch_unlabeled"])
    np.testing.assert_allclose(logged, whole["patch_unlabeled"] / 0.15, rtol=1e-6)


def test_a_supervised_method_trains_the_labeled_term(inputs):
    variables, supervised, _ = inputs
    views, targets, terms, _, moved = run(PLUGIN, (variables, supervised, ()))
    assert views == () and targets == {}
    assert set(terms) == {"patch_labeled"}
    assert jax.tree.structure(moved) == jax.tree.structure(variables["batch_stats"])


def test_identity_changes_nothing(inputs):
    _, supervised, views = inputs
    plugin = Identity()
    assert plugin.init(jax.random.key(0), {}) == {} and plugin.taps == ()
    refined, targets, terms, metrics, moved = run(plugin, ({}, supervised, views))
    assert all(view is before for view, before in zip(refined, views, strict=True))
    assert targets == terms == metrics == moved == {}


def test_counts_do_not_share_names_with_the_methods(inputs):
    _, supervised, views = inputs
    regions = {"supervised": supervised.region, **{v.name: v.region for v in views}}
    counts = PLUGIN.counts(regions)
    assert not counts.keys() & regions.keys()
    valid = real_patches(supervised.region.real, FIELD)
    assert counts["patches/supervised"] == valid.sum() > 0


def test_another_crop_than_it_was_built_for_is_refused(inputs):
    plugin = dataclasses.replace(PLUGIN, tap_size=(6, 5))
    with pytest.raises(ValueError, match=r"built for \(6, 5\)"):
        run(plugin, inputs)


def test_the_pooling_is_the_models():
    assert mpmc.multi_scale_pool is multi_scale_pool
