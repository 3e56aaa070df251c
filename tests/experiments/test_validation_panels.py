"""Panels of validation images, drawn from a state as training has it."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from configs import synthetic
from mpmc_jax.experiments import validation_panels
from mpmc_jax.experiments.build import init_state
from mpmc_jax.experiments.train import prepare
from mpmc_jax.experiments.validation_panels import make_panels
from mpmc_jax.training.state import to_host
from tests.support import tiny
from tests.support.data_sets import prepare_synthetic


@pytest.mark.parametrize("mpmc", [False, True])
def test_panels_show_image_truth_prediction_and_lambda_s(tmp_path, monkeypatch, mpmc):
    prepare_synthetic(tmp_path / "data", train=13, val=4)
    choice = "recommended" if mpmc else "off"
    config = synthetic.get_config(f"method=supervised,split=4,mpmc={choice}")
    tiny.shrink(config)
    config.data.data_dir, config.train.batch_size = str(tmp_path / "data"), 2
    facts, _, setup = prepare(config)
    assert make_panels(config, setup, facts) is None
    config.train.panels = 2
    heads, make_lambda = [], validation_panels.lambda_function

    def lambda_function(*arguments):
        weigh = make_lambda(*arguments)

        def recording(head, *others):
            heads.append(head)
            return weigh(head, *others)

        return recording

    monkeypatch.setattr(validation_panels, "lambda_function", lambda_function)
    draw = make_panels(config, setup, facts)
    state = to_host(init_state(setup, 0))
    found = draw(state)
    assert len(found) == 2 and all(name.startswith("panels/") for name in found)
    again = draw(state)
    for name, picture in found.items():
        shown = Image.open(io.BytesIO(picture.png))
        assert shown.size == (picture.width, picture.height)
        assert picture.width > (4 if mpmc else 3) * 40
        assert picture.width < (5 if mpmc else 4) * 70
        np.testing.assert_array_equal(picture.png, again[name].png)
    # The state is on the host, and uploaded once for all pictures.
    assert len(heads) == (4 if mpmc else 0)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(heads))
