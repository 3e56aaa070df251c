"""All figures on other networks: a U-Net on slices of volumes, a vision transformer."""

import pytest

from launch import prepare_data
from tests.analysis.conftest import train_pair
from tests.analysis.test_figures import FIGURES, draw
from tests.support import trees
from tests.support.data_sets import prepare_synthetic

# ACDC's settings as configs/acdc.py has them.
UNET = {
    "data__name": "acdc",
    "data__crop": 32,
    "data__geometry": "acdc",
    "model__name": "unet",
    "mpmc__tap": "auto",
    "eval__protocol": "volume",
}
TAPS = {"unet": "stage1", "dpt": "block1"}
DPT = {"data__crop": 40, "model__name": "dpt", "model__backbone": "shallow_dinov2"}


@pytest.mark.full
@pytest.mark.parametrize("network", ["unet", "dpt"])
def test_every_figure_is_drawn_of_other_networks(tmp_path, network):
    if network == "unet":
        trees.make_acdc_h5(tmp_path / "source")
        source, output = (f"{tmp_path}/{name}" for name in ("source", "data"))
        named = ["--dataset=acdc", f"--source={source}", f"--data_dir={output}"]
        prepare_data.main(named)
        trained = train_pair(tmp_path, **UNET)
    else:
        prepare_synthetic(tmp_path / "data")
        trained = train_pair(tmp_path, **DPT)
    for name, (runs, options, column) in FIGURES.items():
        options = {} if "classes" in options else options
        if "taps" in options:
            options = {**options, "taps": TAPS[network]}
        draw(trained, name, tmp_path / "figures", (runs, options, column))
