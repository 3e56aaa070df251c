"""Procedural street scenes: the quick start, and what tests train on.

    bash launch/quickstart.sh      (three to ten minutes on two cores)

ResNet-18 from noise at 1/16 of the labels; a small crop and few steps.
"""

import ml_collections

from configs import base, presets


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """See `presets.apply` for the argument."""
    config = base.get_base()
    config.data.name = "synthetic"
    config.data.crop = 97
    config.model.backbone = "resnet18"
    config.optimizer.lr = 2e-2
    config.optimizer.head_multiplier = 1.0
    config.train.batch_size = 2
    config.train.group_size = 2
    config.train.devices = 1
    config.train.steps = 150
    config.train.eval_every = 50
    config.train.checkpoint_every = 50
    return presets.apply(config, argument)
