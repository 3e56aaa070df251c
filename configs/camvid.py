"""CamVid, SegNet's 11-class version, 480 x 360 pixels.

    python -m launch.prepare_data --dataset=camvid --source=DIR --data_dir=data
    python -m launch.train --config=configs/camvid.py:split=1_8 --workdir=runs/camvid

No method here published CamVid numbers: rates and length are UniMatch's for
Cityscapes, the threshold is the one for VOC, the crop fits the images.
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "camvid"
    config.data.split = "1_8"
    config.data.crop = 321
    config.optimizer.lr = 5e-3
    config.optimizer.head_multiplier = 1.0
    config.train.epochs = 240
    return presets.apply(config, argument)
