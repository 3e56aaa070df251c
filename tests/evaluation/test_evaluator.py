"""Evaluation gives the same counts however the work is cut up."""

import dataclasses
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpmc_jax.evaluation import batches, bounded_jit, metrics, protocols
from mpmc_jax.evaluation.evaluator import Evaluator, PatchProbe
from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.models.preprocess import normalize, to_unit
from mpmc_jax.pixels import RGB
from mpmc_jax.types import Prediction
from tests.support.toy_dataset import NUM_CLASSES, SIZES, Dataset, make_dataset

NAMES = ("a", "b", "c", "d", "e")


class _Net(nn.Module):
    """A convolution and a pixel classifier."""

    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(images))
        return Prediction(logits=nn.Conv(NUM_CLASSES, (1, 1), name="head")(x))


@pytest.fixture(scope="module")
def variables():
    return _Net().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def _by_hand(variables, dataset, pad=lambda image: image):
    total = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    for example in dataset:
        image = normalize(to_unit(jnp.asarray(pad(example.image))[None], RGB), RGB)
        logits = _Net().apply(variables, image).logits
        classes = np.asarray(jnp.argmax(logits, -1))[0]
        height, width = example.label.shape
        classes = classes[:height, :width]
        real = example.label != 255
        np.add.at(total, (example.label[real], classes[real]), 1)
    return total


@pytest.mark.parametrize(
    ("batch_size", "num_devices"), [(1, 1), (3, 1), (3, 2), (16, 4)]
)
def test_counts_do_not_depend_on_batch_size_or_devices(
    variables, batch_size, num_devices
):
    dataset = make_dataset(SIZES)
    result = Evaluator(
        _Net(),
        NUM_CLASSES,
        batch_size=batch_size,
        devices=jax.local_devices()[:num_devices],
    ).run(variables, dataset)
    np.testing.assert_array_equal(result.confusion, _by_hand(variables, dataset))
    assert result.confusion.dtype == np.int64
    assert (result.num_images, result.pad_to, result.programs) == (len(SIZES), 0, 3)


@pytest.mark.parametrize("name", ["whole", "slide_unimatch", "center_crop"])
def test_a_single_image_is_less_than_a_batch_and_has_fewer_rows_than_devices(
    variables, name
):
    dataset = make_dataset([(18, 18)])
    found = [
        Evaluator(
            _Net(),
            NUM_CLASSES,
            batch_size=batch_size,
            protocol=build_protocol(name, 12),
            devices=jax.local_devices()[:num_devices],
        ).run(variables, dataset)
        for batch_size, num_devices in ((1, 1), (16, 4))
    ]
    for result in found:
        assert result.num_images == 1
        np.testing.assert_array_equal(result.confusion, found[0].confusion)
        assert set(result.scalars(NAMES)) >= {"miou", "iou/a"}


def test_counts_do_not_depend_on_order(variables):
    dataset, shuffled = make_dataset(SIZES), make_dataset(SIZES)
    np.random.default_rng(1).shuffle(shuffled)
    evaluator = Evaluator(_Net(), NUM_CLASSES, batch_size=2)
    np.testing.assert_array_equal(
        evaluator.run(variables, dataset).confusion,
        evaluator.run(variables, shuffled).confusion,
    )


def test_a_second_run_compiles_nothing_and_sees_new_variables(variables):
    evaluator = Evaluator(_Net(), NUM_CLASSES, batch_size=4)
    dataset = make_dataset(SIZES)
    first = evaluator.run(variables, dataset)
    other = jax.tree.map(lambda x: -x, variables)
    with jax.no_tracing():
        second = evaluator.run(other, dataset)
    assert (first.confusion != second.confusion).any()
    np.testing.assert_array_equal(second.confusion, _by_hand(other, dataset))


def _keep_two_programs(monkeypatch):
    """Two programs per function, counted from none: other tests leave theirs."""
    monkeypatch.setattr(bounded_jit, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(bounded_jit, "RECENT", 1)
    for function in vars(protocols).values():
        if isinstance(function, bounded_jit.BoundedJit):
            monkeypatch.setattr(function, "programs", {})
            monkeypatch.setattr(function, "_recent", {})


@pytest.mark.parametrize(
    "protocol", ["whole", pytest.param("slide_unimatch", marks=pytest.mark.full)]
)
def test_a_bounded_number_of_programs_is_kept(variables, monkeypatch, protocol):
    """However many sizes there are, and every size gives its own exact result."""
    _keep_two_programs(monkeypatch)
    dataset = make_dataset([(12 + i, 20) for i in range(6)])
    evaluator = Evaluator(
        _Net(),
        NUM_CLASSES,
        batch_size=1,
        devices=jax.local_devices()[:1],
        protocol=build_protocol(protocol, 20),
    )

    def live_programs(images):
        result = evaluator.run(variables, Dataset(images))
        gc.collect()
        return result, len(jax.devices()[0].client.live_executables())

    _, few = live_programs(dataset[:3])
    result, many = live_programs(dataset)
    assert many <= few
    if protocol == "whole":
        np.testing.assert_array_equal(result.confusion, _by_hand(variables, dataset))


def test_shapes_of_one_image_do_not_push_each_other_out(monkeypatch):
    """However many sizes came before, batches of one size compile once."""
    monkeypatch.setattr(bounded_jit, "MAX_PROGRAMS", 6)
    monkeypatch.setattr(bounded_jit, "RECENT", 3)
    traced = []

    @bounded_jit.bounded_jit()
    def double(x):
        traced.append(x.shape)
        return 2 * x

    for size in range(1, 6):
        for _ in range(2):  # batches
            for scale in (1, 10, 100):
                assert double(np.ones(size * scale)).shape == (size * scale,)
    assert len(traced) == 15  # each shape once
    assert len(double.programs) == 6
    double(np.ones(1))  # the first ones stay
    assert len(traced) == 15


def test_predictions_of_many_sizes_keep_few_programs(variables, monkeypatch):
    _keep_two_programs(monkeypatch)
    dataset = make_dataset([(12 + i, 20) for i in range(6)])
    predictor = Predictor(_Net(), variables, RGB, build_protocol("whole", 20))

    def live_programs(images):
        found = [predictor(example.image) for example in images]
        gc.collect()
        return found, len(jax.devices()[0].client.live_executables())

    _, few = live_programs(dataset[:3])
    found, many = live_programs(dataset)
    assert many <= few
    for example, classes in zip(dataset, found, strict=True):
        images = normalize(to_unit(jnp.asarray(example.image)[None], RGB), RGB)
        logits = _Net().apply(variables, images).logits
        np.testing.assert_array_equal(classes, np.argmax(logits[0], -1))


def test_padding_mirrors_at_the_lower_right_and_counts_nowhere(variables):
    dataset = make_dataset(SIZES)
    result = Evaluator(_Net(), NUM_CLASSES, batch_size=4, pad_to=16).run(
        variables, dataset
    )

    def pad(image):
        extra = [(0, -side % 16) for side in image.shape[:2]]
        return np.pad(image, [*extra, (0, 0)], mode="symmetric")

    np.testing.assert_array_equal(result.confusion, _by_hand(variables, dataset, pad))
    assert result.confusion.sum() == sum(
        (example.label != 255).sum() for example in dataset
    )
    assert (result.pad_to, result.programs) == (16, 1)


def _probe(variables, images, labels):
    """Pixels as patches: the scores are a linear map of the image."""
    logits = jnp.einsum("bhwc,cd->bhwd", images, variables)
    targets = labels[..., None] == jnp.arange(NUM_CLASSES)[None, None, None]
    return logits, targets, labels != 255


def test_probe_is_counted_in_the_same_pass(variables):
    dataset = make_dataset(SIZES)
    weights = np.random.default_rng(0).normal(size=(3, NUM_CLASSES)).astype(np.float32)
    expected = np.zeros((2, NUM_CLASSES, metrics.BINS), int)
    for example in dataset:
        image = normalize(to_unit(jnp.asarray(example.image)[None], RGB), RGB)
        expected += metrics.score_histogram(
            *_probe(weights, image, jnp.asarray(example.label)[None])
        )
    evaluator = Evaluator(_Net(), NUM_CLASSES, batch_size=4)
    result = evaluator.run(variables, dataset, PatchProbe(weights, _probe))
    np.testing.assert_array_equal(result.confusion, _by_hand(variables, dataset))
    # A logit on an edge may round into the neighboring bin.
    assert np.abs(result.histogram - expected).sum() <= 4
    figures = result.scalars(NAMES)
    assert figures["patch_map"] == metrics.mean_average_precision(result.histogram)
    assert figures["patch_hamming"] == metrics.hamming_accuracy(result.histogram)
    with jax.no_tracing():
        evaluator.run(variables, dataset, PatchProbe(-weights, _probe))


def test_scalars_name_the_classes_that_occur(variables):
    result = Evaluator(_Net(), NUM_CLASSES, batch_size=4).run(
        variables, make_dataset(SIZES[:2])
    )
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    confusion[:2, :2] = [[3, 1], [0, 4]]
    figures = dataclasses.replace(result, confusion=confusion).scalars(NAMES)
    assert figures["iou/a"] == pytest.approx(0.75)
    assert figures["iou/b"] == pytest.approx(0.8)
    assert figures["miou"] == pytest.approx(0.775)
    assert figures["pixel_accuracy"] == pytest.approx(7 / 8)
    assert not {"iou/c", "patch_map"} & figures.keys()


def test_plan_covers_every_image_once_and_fills_devices():
    dataset = make_dataset(SIZES)
    plan = batches.plan(dataset, batch_size=3, num_devices=2)
    assert sorted(i for batch in plan for i in batch.indices) == list(range(7))
    assert {(batch.size, batch.rows) for batch in plan} == {
        ((24, 30), 4),
        ((30, 24), 2),
        ((18, 18), 2),
    }


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_batches_of_a_size_are_few_and_hardly_filled_up(batch_size, num_devices):
    most = -(-batch_size // num_devices) * num_devices
    for images in range(1, 20):
        plan = batches.plan(make_dataset([(6, 5)] * images), batch_size, num_devices)
        (rows,) = {batch.rows for batch in plan}
        assert rows <= most
        assert rows % num_devices == 0
        assert len(plan) == -(-images // most)
        assert 0 <= rows * len(plan) - images < num_devices * len(plan)


def test_bad_arguments_and_an_empty_source_are_named(variables):
    with pytest.raises(ValueError, match="batch_size=0"):
        Evaluator(_Net(), NUM_CLASSES, batch_size=0)
    with pytest.raises(ValueError, match="pad_to=-1"):
        Evaluator(_Net(), NUM_CLASSES, batch_size=1, pad_to=-1)
    with pytest.raises(ValueError, match="no image"):
        Evaluator(_Net(), NUM_CLASSES, batch_size=1).run(variables, Dataset())


def test_a_label_of_another_size_is_named(variables):
    dataset = make_dataset(SIZES)
    dataset[3].image = dataset[3].image[:-1]
    with pytest.raises(ValueError, match=r"^3: .*\(17, 18\)"):
        Evaluator(_Net(), NUM_CLASSES, batch_size=2).run(variables, dataset)
