"""Your own folder of images and masks; see docs/own_data.md.

python -m launch.prepare_data --dataset=folder --source=DIR --data_dir=data
python -m launch.train --config=configs/folder.py:split=1_8 --workdir=runs/mine
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "folder"
    config.data.split = "full"
    return presets.apply(config, argument)
