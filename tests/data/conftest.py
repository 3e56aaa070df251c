"""What tests of the data share."""

import pytest

from tests.support.data_sets import prepare_synthetic


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    prepare_synthetic(path)
    return path
