r"""ACDC, cardiac MRI in four classes: slices for training, volumes for validation.

    python -m launch.prepare_data --dataset=acdc --source=DIR --data_dir=data
    python -m launch.train --config=configs/acdc.py:split=3,lists=LISTS \
        --workdir=runs/acdc

LISTS is a folder of published lists; splits 1, 3 and 7 are numbers of labeled cases.
The network is UniMatch's U-Net; model=deeplabv3plus,backbone=resnet101,crop=224 is what
the text of the paper says (row D12 of docs/deviations.md).
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "acdc"
    config.model.name = "unet"
    return presets.apply(config, argument)
