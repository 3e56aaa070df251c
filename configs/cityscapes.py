r"""Cityscapes, 19 classes, 2048 x 1024 pixels.

    python -m launch.prepare_data --dataset=cityscapes --source=DIR --data_dir=data
    python -m launch.train --config=configs/cityscapes.py:split=1_16,lists=LISTS \
        --config.model.pretrained=resnet50.safetensors --workdir=runs/cityscapes

LISTS is a folder of published lists: SPLIT/labeled.txt and unlabeled.txt. U2PL and AEL
are scored on the center of the images during training, and afterwards by
`launch.evaluate --protocol=slide_u2pl` or `slide_ael`.
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "cityscapes"
    return presets.apply(config, argument)
