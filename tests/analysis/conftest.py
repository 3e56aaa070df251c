"""Two tiny trained runs that the tests of all figures share."""

import types

import pytest

from mpmc_jax import train
from tests.support import tiny
from tests.support.data_sets import prepare_synthetic


def train_tiny(place, name, argument, **changes):
    """Trains a run of a few steps on place/data, and returns its directory."""
    changes = {
        "data__data_dir": str(place / "data"),
        "data__split": "4",
        "data__threads": 0,
        "data__allow_absent_classes": True,
        "train__batch_size": 4,
        "train__steps": 4,
        "train__eval_every": 2,
        "train__checkpoint_every": 2,
        "train__log_every": 1,
        "train__keep": 5,
        **changes,
    }
    train(tiny.config(argument, **changes), place / name)
    return place / name


def train_pair(place, **changes):
    """Trains `baseline`, and `mpmc` with a patch classifier, on place/data."""
    baseline = train_tiny(place, "baseline", "method=supervised,mpmc=off", **changes)
    mpmc = train_tiny(
        place,
        "mpmc",
        "method=supervised,mpmc=recommended",
        mpmc__windows=(1, 7),
        **changes,
    )
    return types.SimpleNamespace(place=place, baseline=baseline, mpmc=mpmc)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A data set and two runs of it: `baseline`, and `mpmc` with a patch classifier."""
    place = tmp_path_factory.mktemp("trained")
    prepare_synthetic(place / "data")
    return train_pair(place)
