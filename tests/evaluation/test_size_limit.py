"""Images and batches that no memory holds are refused before a program is compiled."""

import types

import jax
import numpy as np
import pytest

from mpmc_jax import memory
from mpmc_jax.evaluation.evaluator import Evaluator
from mpmc_jax.evaluation.predict import Predictor
from mpmc_jax.evaluation.protocols import EvalProtocol
from mpmc_jax.evaluation.size_limit import check_size
from mpmc_jax.pixels import RGB


class _Sized(list):
    """A data set that knows sizes; no image of it is ever read."""

    def size(self, index):
        return list.__getitem__(self, index)

    def __getitem__(self, index):
        raise AssertionError("an image was read")

    @property
    def volumes(self):
        return [""] * len(self)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "message"),
    [
        (
            [(40, 50), (10**6, 10**6)],
            1,
            r"1 image of 1000000 x 1000000 .*smaller images",
        ),
        (
            [(3000, 3000)] * 10**4,
            10**9,
            r"10000 images of 3000 x 3000 .*eval.batch_size",
        ),
    ],
)
def test_an_evaluation_that_no_memory_holds_is_refused(sizes, batch_size, message):
    (one,) = devices = jax.local_devices()[:1]
    evaluator = Evaluator(None, 21, batch_size=batch_size, devices=devices)
    assert one.platform == "cpu"
    with pytest.raises(ValueError, match=message):
        evaluator.check(_Sized(sizes))
    with pytest.raises(ValueError, match=message):
        evaluator.run({}, _Sized(sizes))
    Evaluator(None, 21, batch_size=4, devices=devices).check(_Sized([(40, 50)] * 9))


def test_an_image_too_large_to_predict_is_refused():
    image = np.broadcast_to(np.zeros(3, np.uint8), (10**6, 10**6, 3))
    module = types.SimpleNamespace(num_classes=21)
    with pytest.raises(ValueError, match="1 image of 1000000 x 1000000 pixels"):
        Predictor(module, {}, RGB, EvalProtocol(size=1))(image)


def test_the_bound_is_that_of_input_and_scores():
    needed = 2 * 30 * 40 * (3 + 21) * 4
    check_size(2, (30, 40), 24, free=needed, devices=2)
    with pytest.raises(ValueError, match="2 images of 30 x 40 pixels"):
        check_size(2, (30, 40), 24, free=needed - 1, devices=2)


def test_what_programs_keep_is_not_missed_later(monkeypatch):
    """Memory that a training step leaves to the next one looks as if it were used."""
    dataset = _Sized([(40, 50)])
    evaluator = Evaluator(None, 21, batch_size=1, devices=jax.local_devices()[:1])
    module = types.SimpleNamespace(num_classes=21)
    predictor = Predictor(module, {}, RGB, EvalProtocol(size=1))
    monkeypatch.setattr(memory, "available", lambda: 0)
    evaluator.check(dataset)
    with pytest.raises(AttributeError):  # of the network, behind the check
        predictor(np.zeros((40, 50, 3), np.uint8))
