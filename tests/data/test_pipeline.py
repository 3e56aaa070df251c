import collections
import os

import chex
import grain
import jax
import numpy as np
import pytest

from mpmc_jax.data import build
from mpmc_jax.types import Streams
from tests.support.data_sets import config_for, take_batches


def test_shapes_and_types(data_dir):
    pipeline = build.build_train(config_for(data_dir), Streams(partner="same"))
    (batch,) = take_batches(pipeline, 1)
    for crops in (batch.labeled, batch.unlabeled, batch.partner):
        assert crops.image.shape == (4, 32, 32, 3)
        assert crops.image.dtype == np.uint8
        assert crops.extent.shape == (4, 4)
        assert crops.extent.dtype == np.int32
        assert crops.index.dtype == np.int32
        np.testing.assert_array_equal(crops.batch_index, np.arange(4, dtype=np.int32))
    assert batch.labeled.label.shape == (4, 32, 32)
    assert batch.labeled.label.dtype == np.uint8
    assert batch.unlabeled.label is None
    assert batch.partner.label is None


def test_streams_follow_the_method(data_dir):
    config = config_for(data_dir)
    (supervised,) = take_batches(build.build_train(config, Streams(unlabeled=False)), 1)
    assert supervised.unlabeled is None
    assert supervised.partner is None
    (plain,) = take_batches(build.build_train(config, Streams()), 1)
    assert plain.partner is None
    (full,) = take_batches(build.build_train(config, Streams(partner="same")), 1)
    # Neither stream nor partner moves what the others draw.
    chex.assert_trees_all_equal(supervised.labeled, full.labeled)
    chex.assert_trees_all_equal(plain.unlabeled, full.unlabeled)


def test_nothing_needs_to_be_asked_for(data_dir):
    config = config_for(data_dir)
    pipeline = build.build_train(config, Streams(partner="requested"))
    iterator = pipeline.iterator(requests=False)
    batch = next(iterator)
    iterator.close()
    (plain,) = take_batches(build.build_train(config, Streams()), 1)
    assert batch.partner is None
    chex.assert_trees_all_equal(batch, plain)


def test_a_run_is_a_function_of_its_seed_and_not_of_threads(data_dir):
    config = config_for(data_dir)
    reference = take_batches(build.build_train(config, Streams(partner="same")), 5)
    for threads in (3, -1):
        config.data.threads = threads
        again = take_batches(build.build_train(config, Streams(partner="same")), 5)
        chex.assert_trees_all_equal(reference, again)
    config.seed = 1
    other = take_batches(build.build_train(config, Streams(partner="same")), 5)
    assert (reference[0].labeled.image != other[0].labeled.image).any()


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (8, 8), (64, 16)])
def test_every_cpu_has_a_thread_and_every_thread_a_batch(
    cpus, threads, data_dir, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    made, real = [], grain.ReadOptions

    def note(**options):
        made.append(options)
        return real(num_threads=0, prefetch_buffer_size=0)

    config = config_for(data_dir)
    config.data.threads, config.data.prefetch = -1, 4
    pipeline = build.build_train(config, Streams())
    monkeypatch.setattr(grain, "ReadOptions", note)
    pipeline.iterator().close()
    buffer = max(threads, 4)
    assert made == [{"num_threads": threads, "prefetch_buffer_size": buffer}]


@pytest.mark.parametrize("threads", [0, 2])
def test_position_is_the_step(data_dir, threads):
    config = config_for(data_dir)
    config.data.threads = threads
    pipeline = build.build_train(config, Streams(partner="same"))
    reference = take_batches(pipeline, 8)
    chex.assert_trees_all_equal(reference[3:5], take_batches(pipeline, 2, start_step=3))
    iterator = pipeline.iterator()
    for step in range(4):
        assert iterator.get_state() == {"next_index": step}
        next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": 4}
    next(iterator)
    iterator.set_state(state)
    chex.assert_trees_all_equal(reference[4], next(iterator))
    iterator.close()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(data_dir, processes):
    config = config_for(data_dir)
    streams = Streams(partner="same")
    whole = take_batches(build.build_train(config, streams), 6)
    parts = [
        take_batches(
            build.build_train(
                config, streams, process_index=p, process_count=processes
            ),
            6,
        )
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for part in parts:
            place = part[step].labeled.batch_index
            assert len(place) == 4 // processes
            rows = jax.tree.map(lambda x, place=place: x[place], batch)
            chex.assert_trees_all_equal(rows, part[step])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_has_each_record_once_over_all_processes(data_dir, processes):
    """Thirteen images less four labeled ones: two batches of four, one image left."""
    config = config_for(data_dir)
    seen = collections.Counter()
    for p in range(processes):
        pipeline = build.build_train(
            config, Streams(), process_index=p, process_count=processes
        )
        assert pipeline.steps_per_epoch == 2
        for batch in take_batches(pipeline, pipeline.steps_per_epoch):
            seen.update(batch.unlabeled.index.tolist())
    assert len(seen) == 8 and set(seen.values()) == {1}


def test_batch_must_divide_among_processes(data_dir):
    with pytest.raises(ValueError, match=r"batch_size=4.*processes, 3"):
        build.build_train(config_for(data_dir), Streams(), process_count=3)


def test_partner_is_the_same_image_cropped_anew(data_dir):
    pipeline = build.build_train(config_for(data_dir), Streams(partner="same"))
    batches = take_batches(pipeline, 6)
    for batch in batches:
        np.testing.assert_array_equal(batch.unlabeled.index, batch.partner.index)
    same = [
        np.array_equal(a, b)
        for batch in batches
        for a, b in zip(batch.unlabeled.image, batch.partner.image, strict=True)
    ]
    assert not any(same)


def test_an_epoch_is_a_permutation_and_epochs_differ(data_dir):
    config = config_for(data_dir, batch_size=3)
    pipeline = build.build_train(config, Streams())
    assert (pipeline.num_labeled, pipeline.num_unlabeled) == (4, 9)
    assert pipeline.steps_per_epoch == 3
    indices = np.stack([b.unlabeled.index for b in take_batches(pipeline, 12)])
    epochs = indices.reshape(4, 9)
    for epoch in epochs:
        assert sorted(epoch) == list(range(9))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_epochs_have_whole_batches_of_distinct_images(data_dir):
    pipeline = build.build_train(config_for(data_dir, batch_size=4), Streams())
    assert pipeline.steps_per_epoch == 2
    indices = np.stack([b.unlabeled.index for b in take_batches(pipeline, 20)])
    for epoch in indices.reshape(10, 8):
        assert len(set(epoch)) == 8
    # The image left out is another one each time.
    assert set(indices.ravel()) == set(range(9))


def test_labeled_list_is_tiled_and_cut(data_dir):
    config = config_for(data_dir, batch_size=3)
    pipeline = build.build_train(config, Streams())
    assert pipeline.repetition == 9 / 4
    indices = np.stack([b.labeled.index for b in take_batches(pipeline, 6)])
    for epoch in indices.reshape(2, 9):
        # 0 1 2 3 | 0 1 2 3 | 0: tiled three times, cut at nine, then shuffled.
        assert np.bincount(epoch, minlength=4).tolist() == [3, 2, 2, 2]


def test_supervised_takes_as_many_steps(data_dir):
    config = config_for(data_dir, batch_size=3)
    pipeline = build.build_train(config, Streams(unlabeled=False))
    assert pipeline.steps_per_epoch == 3
    assert pipeline.repetition == 9 / 4


@pytest.mark.parametrize("processes", [1, 2])
def test_supervised_epochs_may_be_of_the_labeled_list(data_dir, processes):
    """Nine images in batches of four: two steps, shared by processes."""
    config = config_for(data_dir, split="9")
    config.train.epoch_of = "labeled"
    streams = Streams(unlabeled=False)
    whole = take_batches(build.build_train(config, streams), 6)
    for p in range(processes):
        pipeline = build.build_train(
            config, streams, process_index=p, process_count=processes
        )
        assert (pipeline.steps_per_epoch, pipeline.repetition) == (2, 8 / 9)
        late = take_batches(pipeline, 3, start_step=3)
        for batch, all_rows in zip(late, whole[3:], strict=True):
            rows = batch.labeled.batch_index
            chex.assert_trees_all_equal(
                batch, jax.tree.map(lambda x, rows=rows: x[rows], all_rows)
            )
    for epoch in np.stack([b.labeled.index for b in whole]).reshape(3, 8):
        assert len(set(epoch)) == 8


def test_a_surplus_of_labels_is_used_over_the_epochs(data_dir):
    config = config_for(data_dir, batch_size=2, split="10")
    pipeline = build.build_train(config, Streams())
    assert (pipeline.num_unlabeled, pipeline.steps_per_epoch) == (3, 1)
    indices = {int(i) for b in take_batches(pipeline, 40) for i in b.labeled.index}
    assert indices == set(range(10)) and not pipeline.unused


def test_a_surplus_of_labels_that_is_cut_is_counted(data_dir):
    config = config_for(data_dir, batch_size=3, split="10")
    pipeline = build.build_train(config, Streams(order="drawn"))
    indices = {int(i) for b in take_batches(pipeline, 40) for i in b.labeled.index}
    assert len(indices) == 3 and pipeline.unused == 7


def test_fewer_images_than_a_batch_is_legal(data_dir):
    config = config_for(data_dir, batch_size=16, split="1")
    pipeline = build.build_train(config, Streams(partner="same"))
    assert pipeline.steps_per_epoch == 1
    assert pipeline.repetition == 16
    batch = take_batches(pipeline, 2)[1]
    assert batch.labeled.image.shape[0] == 16
    np.testing.assert_array_equal(batch.labeled.index, 0)
    # One image sixteen times, and sixteen crops.
    assert len({crop.tobytes() for crop in batch.labeled.image}) == 16


def test_no_unlabeled_image_is_refused_where_the_method_needs_some(data_dir):
    config = config_for(data_dir, split="13")
    with pytest.raises(ValueError, match="method=supervised"):
        build.build_train(config, Streams())
    pipeline = build.build_train(config, Streams(unlabeled=False))
    assert pipeline.steps_per_epoch == 3


def test_full_split_leaves_all_images_unlabeled(data_dir):
    pipeline = build.build_train(config_for(data_dir, split="full"), Streams())
    assert pipeline.num_labeled == pipeline.num_unlabeled == 13
