"""Two processes share an evaluation and agree with one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mpmc_jax.evaluation.evaluator import Evaluator, PatchProbe
from mpmc_jax.evaluation.protocols import build_protocol
from mpmc_jax.types import Prediction
from tests.support.programs import free_address
from tests.support.toy_dataset import NUM_CLASSES, SIZES, make_dataset
from tests.support.xla import device_flags

ROOT = pathlib.Path(__file__).parent.parent.parent


class _Linear(nn.Module):
    @nn.compact
    def __call__(self, images):
        return Prediction(logits=nn.Dense(NUM_CLASSES)(images))


def _probe(variables, images, labels):
    logits = jnp.broadcast_to(images[..., :1], (*labels.shape, NUM_CLASSES))
    targets = labels[..., None] == jnp.arange(NUM_CLASSES)[None, None, None]
    return logits * variables, targets, labels != 255


def make_volumes():
    """Three volumes of other depths."""
    dataset = make_dataset([(24, 30)] * 2 + [(18, 18)] * 3 + [(24, 30)])
    for example, name in zip(dataset, "aabbbc", strict=True):
        example.volume = name
    return dataset


def evaluate():
    """The counts as this process sees them, JSON-ready."""
    module = _Linear()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
    result = Evaluator(module, NUM_CLASSES, batch_size=2).run(
        variables, make_dataset(SIZES), PatchProbe(jnp.float32(1), _probe)
    )
    volumes = Evaluator(
        module, NUM_CLASSES, batch_size=2, protocol=build_protocol("volume", 16)
    ).run(variables, make_volumes())
    return {
        "volumes": np.nan_to_num(volumes.volumes.values, nan=-1).tolist(),
        "confusion": result.confusion.tolist(),
        "positives": result.histogram[1].sum(-1).tolist(),
        "num_images": result.num_images,
    }


@pytest.mark.full
def test_two_processes_agree_with_one():
    address = free_address()
    code = (
        "import jax, json, sys; rank = int(sys.argv[1]);"
        f"jax.distributed.initialize({address!r}, 2, rank);"
        "from tests.evaluation.test_processes import evaluate;"
        "print(json.dumps(evaluate()))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": device_flags(2)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    alone = evaluate()
    assert np.sum(alone["confusion"]) > 0
    assert np.max(alone["volumes"]) > 0 and np.shape(alone["volumes"])[0] == 3
    for text in printed:
        assert json.loads(text.splitlines()[-1]) == alone
