"""U2PL's and AEL's orders of the labeled list, their sources, and requested images."""

import itertools

import jax
import numpy as np
import pytest

from mpmc_jax.data import build, splits
from mpmc_jax.data.sampling import EpochOrder
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for

U2PL = Streams(geometry="u2pl", fill="rounded_mean", order="drawn")
AEL = Streams(
    one_per_group=True,
    partner="requested",
    source_scales=(0.1, 2.0),
    order="restarted",
    geometry="u2pl",
    fill="rounded_mean",
)


def _places(order, name, count):
    dataset = order.build(name)
    return [int(dataset[i]) for i in range(count)]


def _order(kind, labeled, unlabeled, batch, groups=1):
    return EpochOrder(kind, labeled, unlabeled, batch, groups, batch, seed=3)


# Steps of an epoch in the authors' logs and configurations: GPUs, images on each.
VOC, CITY = 10582, 2975
STEPS = {
    (4, 4): {92: 655, 183: 650, 366: 638, 732: 615, 1464: 570, 662: 620, 1323: 578}
    | {2646: 496, 5291: 330},
    (8, 2): {186: 174, 372: 163, 744: 139, 1488: 93}
    | {662: 620, 1323: 579, 2646: 496, 5291: 331},
}
CASES = [
    (gpus, labeled, steps)
    for gpus, of in STEPS.items()
    for labeled, steps in of.items()
]


@pytest.mark.parametrize("gpus, labeled, steps", CASES)
def test_an_epoch_is_as_long_as_published(gpus, labeled, steps):
    total = CITY if labeled in (186, 372, 744, 1488) else VOC
    count, members = gpus
    order = _order("drawn", labeled, total - labeled, count * members, count)
    assert order.steps_per_epoch == steps


@pytest.mark.parametrize("kind", ["tiled", "drawn"])
def test_an_epoch_is_filled_up_from_its_beginning(kind):
    order = _order(kind, 5, 11, batch=4, groups=2)
    assert order.steps_per_epoch == 3  # six images on each of two, the last one again
    places = np.array(_places(order, "unlabeled", 48)).reshape(4, 12)
    for epoch in places:
        assert set(epoch[:11]) == set(range(11)) and epoch[11] == epoch[0]
    assert len({tuple(epoch) for epoch in places}) == 4


def test_an_epoch_of_the_labeled_list_drops_what_fills_no_batch():
    """As DistributedSampler and drop_last do on two processes of four images each."""
    order = _order("tiled", 23, 0, batch=8, groups=2)
    assert order.steps_per_epoch == 3  # twelve images on each, one of them again
    places = np.array(_places(order, "labeled", 96)).reshape(4, 24)
    for epoch in places:
        assert set(epoch[:23]) == set(range(23)) and epoch[23] == epoch[0]
    order = _order("tiled", 22, 0, batch=8, groups=2)
    assert order.steps_per_epoch == 2  # eleven on each, of which three are dropped
    places = np.array(_places(order, "labeled", 160)).reshape(10, 16)
    for epoch in places:
        assert len(set(epoch)) == 16
    assert set(places.ravel()) == set(range(22))
    assert len({tuple(epoch) for epoch in places}) == 10


@pytest.mark.parametrize(
    "kind, labeled, unlabeled",
    # A longer labeled list is not cut when tiled, and so not paired.
    [("drawn", 13, 12)]
    + [(kind, *sizes) for kind in ("tiled", "drawn") for sizes in ((3, 14), (5, 12))],
)
def test_pairs_are_the_same_in_every_epoch(kind, labeled, unlabeled):
    order = _order(kind, labeled, unlabeled, batch=2)
    epoch = order.steps_per_epoch * 2
    first = _places(order, "labeled", 3 * epoch)
    second = _places(order, "unlabeled", 3 * epoch)
    pairs = [
        sorted(zip(first[i : i + epoch], second[i : i + epoch], strict=True))
        for i in range(0, 3 * epoch, epoch)
    ]
    assert pairs[0] == pairs[1] == pairs[2]
    # Only their succession changes.
    assert second[:epoch] != second[epoch : 2 * epoch]
    assert len(set(second[:epoch])) == epoch
    times = np.bincount(first[:epoch], minlength=labeled)
    if labeled > unlabeled:
        assert sorted(times) == [0] * (labeled - epoch) + [1] * epoch
    else:
        # Cut from one list more than the unlabeled ones fill.
        assert times.max() <= -(-unlabeled // labeled)


@pytest.mark.parametrize(
    "kind, labeled, unused",
    [("tiled", 30, 0), ("drawn", 30, 20), ("restarted", 30, 20), ("restarted", 9, 0)],
)
def test_labeled_images_that_no_epoch_uses_are_counted(kind, labeled, unused):
    order = _order(kind, labeled, 10, batch=2)
    places = set(_places(order, "labeled", 30 * 10))
    assert len(places) == labeled - unused == labeled - order.unused


def _as_the_release_does(length, batch, steps, epochs, permutations):
    """A loader that is begun anew each epoch; its permutation moves when it ends."""
    number, served = 0, []
    for _ in range(epochs):
        queue = None
        for _ in range(steps):
            if queue is not None and not queue:
                number += 1
            if not queue:
                whole = list(permutations(number))
                missing = -length % batch
                padded = whole + [whole[i % length] for i in range(missing)]
                queue = [padded[i : i + batch] for i in range(0, len(padded), batch)]
            served += queue.pop(0)
    return served


@pytest.mark.parametrize("length, batch, steps", [(5, 2, 4), (4, 2, 2), (9, 2, 3)])
def test_a_restarted_loader_is_the_released_one(length, batch, steps):
    order = _order("restarted", length, steps * batch, batch)
    found = _places(order, "labeled", 4 * steps * batch)
    expected = _as_the_release_does(
        length,
        batch,
        steps,
        4,
        lambda number: np.random.default_rng((3, 2, number)).permutation(length),
    )
    assert found == expected


def _batches(streams, data_dir, count, start=0, ask=(), **processes):
    pipeline = build.build_train(config_for(data_dir), streams, **processes)
    iterator = pipeline.iterator(start)
    for step, images in ask:
        iterator.request(step, np.array(images))
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def test_u2pls_streams_pair_alike(data_dir):
    batches = _batches(U2PL, data_dir, 4)
    pairs = {}
    for batch in batches:
        for one, other in zip(batch.labeled.index, batch.unlabeled.index, strict=True):
            assert pairs.setdefault(int(other), int(one)) == one
    padded = 0
    for batch in batches:
        for label, (top, left, bottom, right) in zip(
            batch.labeled.label, batch.labeled.extent, strict=True
        ):
            outside = np.ones(label.shape, bool)
            outside[top:bottom, left:right] = False
            assert not label[outside].any()
            padded += outside.sum()
    assert padded


def test_a_source_comes_half_of_the_time(data_dir):
    batches = _batches(AEL, data_dir, 30, ask=[(i, [0, 1]) for i in range(30)])
    extents = np.concatenate([batch.source.extent for batch in batches])
    labels = np.concatenate([batch.source.label for batch in batches])
    there = extents.any(axis=1)
    assert 0.35 < there.mean() < 0.65
    assert (labels[~there] == 255).all()
    assert (labels[there] < 255).any(axis=(1, 2)).all()
    # Down to a tenth of their size, where U2PL's shrink to one half.
    heights = extents[there][:, 2] - extents[there][:, 0]
    assert heights.min() < 18
    assert {batch.unlabeled.image.shape[0] for batch in batches} == {2}
    np.testing.assert_array_equal(batches[0].unlabeled.batch_index, [0, 1])


def test_requested_images_are_served_whatever_came_before(data_dir):
    ask = [(2, [5, 3]), (3, [3, 3])]
    whole = _batches(AEL, data_dir, 4, ask=[(0, [0, 1]), (1, [2, 2]), *ask])
    late = _batches(AEL, data_dir, 2, start=2, ask=ask)
    for one, other in zip(whole[2:], late, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_array_equal(late[0].partner.index, [5, 3])
    # The same image twice, each with draws of its own.
    assert (late[1].partner.image[0] != late[1].partner.image[1]).any()
    for process in range(2):
        (half,) = _batches(
            AEL,
            data_dir,
            1,
            start=2,
            ask=ask,
            process_index=process,
            process_count=2,
        )
        jax.tree.map(
            lambda part, of_all, process=process: np.testing.assert_array_equal(
                part, of_all[process::2]
            ),
            half,
            late[0],
        )


def test_a_step_without_its_request_says_so(data_dir):
    with pytest.raises(RuntimeError, match="no image was requested for step 0"):
        _batches(AEL, data_dir, 1)


def test_a_class_that_is_never_labeled_is_refused():
    split = splits.Split(("a", "b"), ("c",))
    present = {"a": (0,), "b": (0, 2), "c": (1,)}
    with pytest.raises(ValueError, match="1 of 3 classes .*: tree; .*allow_absent"):
        splits.check_classes(split, present, ("sky", "tree", "road"))
    splits.check_classes(split, {**present, "a": (1,)}, ("sky", "tree", "road"))
