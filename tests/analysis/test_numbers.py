"""The numbers of the figures equal those of direct computations on small cases."""

import itertools
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmc_jax.analysis import (
    confusion,
    figure1,
    figure3,
    figure4,
    patches,
    pseudo_labels,
    reliability,
    supp_figure1,
    table4,
)
from mpmc_jax.analysis.examples import choose_classes
from mpmc_jax.analysis.pseudo_label_maps import PseudoLabels
from mpmc_jax.models.receptive_field import ReceptiveField
from mpmc_jax.plugins.mpmc.patches import nearest_patch, patch_targets
from mpmc_jax.types import IGNORE_LABEL

CLASSES = 4
SIZE = (18, 23)  # one for all, so that JAX compiles once
FIELD = ReceptiveField(size=7, stride=4, padding=3)
seeds = st.integers(0, 2**32 - 1)


def draw_view(seed):
    """A view of random labels in blocks, and random predictions and logits."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    blocks = rng.choice([*range(CLASSES), IGNORE_LABEL], (6, 6))
    label = np.kron(blocks, np.ones((4, 4), int))[:height, :width].astype(np.uint8)
    targets, valid = patch_targets(label[None], CLASSES, FIELD)
    grid = targets.shape[1:3]
    sides = list(zip(label.shape, grid, strict=True))
    rows, columns = (FIELD.spans(side, count) for side, count in sides)
    row, column = (nearest_patch(side, count, FIELD) for side, count in sides)
    view = patches.PatchView(
        label=label,
        logits=rng.normal(size=(*grid, CLASSES)).astype(np.float32),
        targets=np.asarray(targets[0]),
        valid=np.asarray(valid[0]),
        rows=rows,
        columns=columns,
        nearest=(row, column),
    )
    return view, rng.integers(0, CLASSES, label.shape)


def each_patch(view):
    """Index and pixels of every patch, by the definition of the receptive field."""
    height, width = view.label.shape
    for row, column in np.ndindex(view.valid.shape):
        top, left = (i * FIELD.stride - FIELD.padding for i in (row, column))
        yield (
            (row, column),
            np.s_[
                max(top, 0) : min(top + FIELD.size, height),
                max(left, 0) : min(left + FIELD.size, width),
            ],
        )


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_patches_are_the_receptive_fields_of_the_targets(seed):
    view, classes = draw_view(seed)
    counts = np.stack([view.count(view.label == c) for c in range(CLASSES)], axis=-1)
    np.testing.assert_array_equal(counts > 0, view.targets)
    seen = view.count(classes == 1)
    for place, pixels in each_patch(view):
        assert seen[place] == (classes[pixels] == 1).sum()
        inside = np.unique(view.label[pixels])
        expected = [c in inside for c in range(CLASSES)]
        assert view.targets[place].tolist() == expected
        assert view.valid[place] == any(expected)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_miou_inside_patches_is_that_of_their_pixels_alone(seed):
    view, classes = draw_view(seed)
    found = table4.patch_miou(view, classes)
    for place, pixels in each_patch(view):
        label, predicted = view.label[pixels], classes[pixels]
        known = label != IGNORE_LABEL
        ious = []
        for c in range(CLASSES):
            both = (known & (label == c) & (predicted == c)).sum()
            either = (known & ((label == c) | (predicted == c))).sum()
            if either:
                ious.append(both / either)
        expected = np.mean(ious) if ious else np.nan
        np.testing.assert_allclose(found[place], expected)


@given(st.integers(1, 25), seeds)
def test_patches_are_binned_by_the_share_of_right_classes(classes, seed):
    rng = np.random.default_rng(seed)
    targets = rng.random((3, 5, classes)) < 0.5
    logits = np.where(rng.random(targets.shape) < 0.5, 1.0, -1.0)
    found = table4.hamming_bins(logits, targets)
    for place in np.ndindex(3, 5):
        wrong = sum((logits[place] > 0) != targets[place])
        # In tenths of percents, without rounding.
        right = 1000 * (classes - wrong) // classes
        assert found[place] == min(right // 100, 9)


def test_all_right_and_all_wrong_are_in_the_outer_bins():
    targets = np.eye(10, dtype=bool)[None]
    logits = np.where(targets, 1.0, -1.0)
    assert (table4.hamming_bins(logits, targets) == 9).all()
    assert (table4.hamming_bins(-logits, targets) == 0).all()
    logits[..., 0] *= -1  # one wrong of ten: exactly 90 percent
    assert (table4.hamming_bins(logits, targets) == 9).all()


@settings(deadline=None)
@given(seeds)
def test_instances_are_what_a_flood_fill_finds(seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, (7, 9))
    classes = rng.integers(0, 2, label.shape)
    expected, seen = [], np.zeros(label.shape, bool)
    for start in map(tuple, np.argwhere(label == 1)):
        stack, pixels = [start], []
        while stack:
            row, column = place = stack.pop()
            inside = 0 <= row < 7 and 0 <= column < 9
            if not inside or seen[place] or label[place] != 1:
                continue
            seen[place] = True
            pixels.append(place)
            near = ((1, 0), (-1, 0), (0, 1), (0, -1))
            stack += [(row + down, column + right) for down, right in near]
        if pixels:
            right = sum(classes[place] == 1 for place in pixels)
            expected.append((len(pixels), right))
    areas, right = figure4.measure_instances(label, classes, 1)
    assert sorted(zip(areas, right, strict=True)) == sorted(expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_every_instance_is_in_one_bin_and_no_bin_is_empty(areas, bins):
    areas = np.array(areas)
    edges = figure4.bin_by_area(areas, bins)
    counts = [
        ((low <= areas) & (areas < high)).sum()
        for low, high in itertools.pairwise(edges)
    ]
    assert sum(counts) == len(areas) and min(counts) > 0 and len(counts) <= bins


def test_bins_of_distinct_areas_have_the_same_number_of_instances():
    areas = np.random.default_rng(0).permutation(np.arange(1, 21))
    edges = figure4.bin_by_area(areas, 5)
    found = [np.sum((a <= areas) & (areas < b)) for a, b in itertools.pairwise(edges)]
    assert found == [4] * 5


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_energy_is_summed_over_right_and_missed_pixels(seed):
    view, classes = draw_view(seed)
    row, column = view.nearest
    for number in range(CLASSES):
        expected = {kind: [] for kind in supp_figure1.KINDS}
        for i, j in np.ndindex(view.label.shape):
            true, predicted = view.label[i, j] == number, classes[i, j] == number
            if view.label[i, j] == IGNORE_LABEL or not (true or predicted):
                continue
            kind = ("false " if true != predicted else "true ") + (
                "positives" if predicted else "negatives"
            )
            logit = float(view.logits[row[i], column[j], number])
            expected[kind].append(np.log(1 + np.exp(logit)))
        found = supp_figure1.energy_sums(view, classes, number)
        direct = [[np.sum(x), len(x)] for x in expected.values()]
        np.testing.assert_allclose(found, direct, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([4], "checkpoints of step 4 alone"), ([2, 4, 6, 2], "two checkpoints of step 2")],
)
def test_energies_need_several_steps_of_one_checkpoint_each(steps, message):
    with pytest.raises(ValueError, match=f"a, b: {message}"):
        supp_figure1._check_steps("a, b", steps)
    supp_figure1._check_steps("a", [2, 4])


def test_the_energy_of_large_logits_is_finite():
    found = supp_figure1.label_wise_energy(np.array([-1000, 0, 1000], np.float32))
    np.testing.assert_allclose(found, [0, np.log(2), 1000])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_the_area_under_roc_is_the_share_of_ordered_pairs(pairs):
    right, score = (np.array(values) for values in zip(*pairs, strict=True))
    found = pseudo_labels.area_under_roc(right, score)
    compared = [(a > b) + (a == b) / 2 for a in score[right] for b in score[~right]]
    if not compared:
        assert found is None
    else:
        np.testing.assert_allclose(found, np.mean(compared))


@settings(deadline=None)
@given(seeds)
def test_quality_of_pseudo_labels_is_that_of_all_pixels(seed):
    rng = np.random.default_rng(seed)
    quality, parts = pseudo_labels.Quality(threshold=0.6), []
    for _ in range(3):
        label = rng.choice([0, 1, IGNORE_LABEL], (5, 6))
        scores = rng.random((3, 5, 6), np.float32) + np.float32(0.01)
        weight, confidence, oracle = scores
        pseudo = rng.integers(0, 2, (5, 6))
        maps = PseudoLabels(pseudo, confidence, weight, oracle)
        quality.add(maps, label)
        known = label != IGNORE_LABEL
        parts.append([(maps.label == label)[known], *scores[:, known]])
    right, weight, confidence, oracle = map(np.concatenate, zip(*parts, strict=True))
    row = quality.row()
    confident = confidence >= np.float32(0.6)
    weight, oracle = weight.astype(float), oracle.astype(float)
    expected = {
        "accuracy": right.mean(),
        "coverage": confident.mean(),
        "accuracy_covered": right[confident].mean(),
        "lambda_right": weight[right].mean() / weight.mean(),
        "lambda_wrong": weight[~right].mean() / weight.mean(),
        "oracle_right": oracle[right].mean() / oracle.mean(),
        "oracle_wrong": oracle[~right].mean() / oracle.mean(),
        "auroc_lambda": pseudo_labels.area_under_roc(right, weight),
        "auroc_confidence": pseudo_labels.area_under_roc(right, confidence),
        "auroc_oracle": pseudo_labels.area_under_roc(right, oracle),
    }
    np.testing.assert_allclose([row[key] for key in expected], [*expected.values()])
    assert row["right_pixels"] == right.sum() and row["images"] == 3


@given(seeds, st.integers(1, 12))
def test_calibration_error_is_that_of_the_definition(seed, bins):
    rng = np.random.default_rng(seed)
    confidence = rng.choice([*rng.random(20), 0, 1, 1 / bins], 50).astype(np.float32)
    right = rng.random(50) < confidence
    sums = reliability.confidence_sums(confidence, right, bins)
    error = 0.0
    for number in range(bins):
        low, high = np.float32(number), np.float32(number + 1)
        scaled = confidence * bins
        inside = (low <= scaled) & ((scaled < high) | (number == bins - 1))
        assert sums[number, 0] == inside.sum()
        if inside.any():
            gap = right[inside].mean() - confidence[inside].astype(float).mean()
            error += inside.mean() * abs(gap)
    np.testing.assert_allclose(
        reliability.expected_calibration_error(sums), error, atol=1e-6
    )


def test_rows_of_a_confusion_matrix_sum_to_one():
    counts = np.array([[3, 1], [0, 0]])
    found = confusion.normalize_by_truth(counts)
    np.testing.assert_array_equal(found, [[0.75, 0.25], [np.nan, np.nan]])


def test_boxes_are_where_most_pixels_differ():
    differs = np.zeros((12, 16), bool)
    differs[1:4, 2:5] = True
    differs[8:10, 10:13] = True
    boxes = figure3.choose_boxes(differs, 3, 5)
    assert boxes[0] == (1, 2) and len(boxes) == 2
    top, left = boxes[1]
    assert differs[top : top + 3, left : left + 3].sum() == 6
    assert not figure3.choose_boxes(np.zeros((4, 4), bool), 2, 3)


def test_chosen_patches_have_most_pixels_of_unsupported_classes():
    view, classes = draw_view(3)
    chosen = figure1.choose_patches(view, classes, 3)
    pixels = np.zeros(view.valid.shape, int)
    for place, inside in each_patch(view):
        missing = view.logits[place] <= 0
        pixels[place] = missing[classes[inside]].sum()
    first = chosen[0]
    inside = np.s_[slice(*first.rows), slice(*first.columns)]
    assert first.unsupported[classes[inside]].sum() == pixels.max()
    for one, other in itertools.combinations(chosen, 2):
        shared = [
            range(max(a[0], b[0]), min(a[1], b[1]))
            for a, b in ((one.rows, other.rows), (one.columns, other.columns))
        ]
        assert not all(shared)


def test_a_picture_is_resized_by_the_nearest_pixel():
    picture = np.arange(6).reshape(2, 3, 1)
    found = figure1._resized(picture, np.zeros((4, 3)))
    np.testing.assert_array_equal(found[..., 0], [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2)


@pytest.mark.parametrize("name", ["a", "b+z"])
def test_unknown_classes_are_listed(name):
    facts = types.SimpleNamespace(class_names=("b", "c"), num_classes=2)
    with pytest.raises(ValueError, match="is unknown; valid: b, c"):
        choose_classes(facts, name)
    assert choose_classes(facts, "") == [0, 1] and choose_classes(facts, "c") == [1]
