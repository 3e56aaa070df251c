r"""Pascal VOC 2012 with the masks of SBD, 21 classes.

    python -m launch.prepare_data --dataset=voc --source=DIR --data_dir=data
    python -m launch.train --config=configs/voc.py:split=92,lists=LISTS \
        --config.model.pretrained=resnet50.safetensors --workdir=runs/voc

LISTS is a folder of published lists: SPLIT/labeled.txt and unlabeled.txt. The classic
splits are 92 to 1464, the blender ones 1_16 to 1_4 and u2pl_1_16 to u2pl_1_4.
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "voc"
    return presets.apply(config, argument)
