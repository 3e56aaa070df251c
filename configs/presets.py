"""Variants by string argument: what a method needs, and MPMC's modes.

`apply(config, argument)` reads "method=unimatch,mpmc=paper,split=1_8". What a data-set
file sets before is the ground that it stands on; what a method's authors published for
the data set comes on top; --config.a.b=VALUE overrides everything.
"""

import ml_collections

from mpmc_jax.text import did_you_mean

_KEYS = ("method", "mpmc", "split", "lists", "backbone", "model", "crop")

# "recommended": the paper's method with a lambda_s of mean 1 (row D4 of
# docs/deviations.md: as written it divides L_u by ten) and the cheap head (D16). No
# form was measured to be better than the best settings without MPMC
# (results/evidence).
MPMC = {
    "off": {"enabled": False},
    "paper": {"enabled": True},
    "recommended": {"enabled": True, "lambda_scale": "mean", "head": "lite"},
}

# What a method needs whatever the data set.
METHODS = {
    "supervised": {},
    "mean_teacher": {"method.ema_decay": 0.999, "method.rampup": -1},
    "unimatch": {"optimizer.lag": 1},
    "unimatch_v2": {"method.ema_decay": 0.996, "optimizer.lag": 1},
    "fixmatch": {"optimizer.lag": 1},
    "cps": {},
    "augseg": {"method.ema_decay": 0.999},
    "u2pl": {"method.ema_decay": 0.99},
    "ael": {
        "method.ema_decay": 0.99,
        "method.threshold": 0.7,
        "method.auxiliary_weight": 0.4,
        "method.supervised_loss": "ohem",
        "method.ohem_min_kept": 100_000,
    },
}


# What the authors published for a data set. A batch is group_size images on each of
# their GPUs; the rate is the backbone's.
_VOC = {
    "data.crop": 513,
    "train.batch_size": 16,
    "train.epochs": 80,
    "optimizer.lr": 1e-3,
    "optimizer.head_multiplier": 10.0,
    "optimizer.weight_decay": 1e-4,
    # No image of VOC exceeds 500 pixels, so that there are at most four sizes.
    "eval.pad_to": 256,
}
_CITYSCAPES = {
    "train.batch_size": 16,
    "optimizer.lr": 1e-2,
    "optimizer.head_multiplier": 1.0,
    "optimizer.weight_decay": 1e-4,
    "method.supervised_loss": "ohem",
    "method.ohem_threshold": 0.7,
    "method.ohem_min_kept": 100_000,
    "eval.protocol": "slide_unimatch",
}
# Road, sidewalk, building, vegetation, sky; AEL's release has the same for VOC.
_AEL_UNQUERIED = (0, 1, 2, 8, 10)
PUBLISHED = {
    "voc": {
        "unimatch": {
            **_VOC,
            "data.crop": 321,
            "train.batch_size": 8,
            "train.group_size": 2,
            "optimizer.lag": 1,
        },
        "augseg": {**_VOC, "data.scale_base": 500, "train.group_size": 8},
        "u2pl": {
            **_VOC,
            "model.backbone": "resnet101",
            "train.group_size": 4,
            "u2pl.warmup_epochs": 1,
        },
        # The code divides every loss by the number of GPUs twice: on one mesh that is a
        # fourth of the rate and four times the decay. 1/8 of the labels takes 34
        # epochs; 1/16, 1/4, 1/2: 32, 40, 60.
        "cps": {
            **_VOC,
            "data.crop": 512,
            "train.batch_size": 8,
            "train.group_size": 2,
            "train.epochs": 34,
            "optimizer.lr": 2.5e-3,
            "optimizer.head_multiplier": 1.0,
            "optimizer.weight_decay": 4e-4,
        },
        "ael": {
            **_VOC,
            "model.backbone": "resnet101",
            "train.group_size": 2,
            "optimizer.lr": 1e-2,
            "ael.query_classes": 1,
            "ael.unqueried": _AEL_UNQUERIED,
            "ael.object_area": 0.03,
            "ael.presence_area": 0.03,
        },
    },
    "cityscapes": {
        "unimatch": {
            **_CITYSCAPES,
            "data.crop": 801,
            "train.batch_size": 8,
            "train.group_size": 2,
            "train.epochs": 240,
            "optimizer.lr": 5e-3,
            "optimizer.lag": 1,
            "method.threshold": 0.0,
            "method.ohem_min_kept": 200_000,
        },
        "augseg": {
            **_CITYSCAPES,
            "data.crop": 800,
            "train.group_size": 4,
            "train.epochs": 240,
            "optimizer.weight_decay": 5e-4,
            "method.threshold": 0.0,
            "method.ema_decay": 0.996,
        },
        "u2pl": {
            **_CITYSCAPES,
            "model.backbone": "resnet101",
            "data.crop": 769,
            "train.group_size": 2,
            "train.epochs": 200,
            "optimizer.weight_decay": 5e-4,
            "method.auxiliary_weight": 0.4,
            "u2pl.warmup_epochs": 0,
            "eval.protocol": "center_crop",
        },
        # As on VOC, with eight GPUs. Other splits: 128, 160, 240 epochs.
        "cps": {
            **_CITYSCAPES,
            "data.crop": 800,
            "train.batch_size": 8,
            "train.group_size": 1,
            "train.epochs": 137,
            "optimizer.lr": 2.5e-3,
            "optimizer.weight_decay": 8e-4,
            "method.ohem_min_kept": 50_000,
            "cps.weight": 5.0,
            "cps.plain_weight": 6.0,
            "eval.protocol": "slide_u2pl",
        },
        "ael": {
            **_CITYSCAPES,
            "model.backbone": "resnet101",
            "data.crop": 769,
            "train.group_size": 2,
            "train.epochs": 200,
            "optimizer.head_multiplier": 10.0,
            "method.threshold": 0.0,
            "ael.query_classes": 3,
            "ael.unqueried": _AEL_UNQUERIED,
            "ael.object_area": 0.005,
            "ael.presence_area": 0.01,
            "eval.protocol": "center_crop",
        },
    },
}


def _baseline(unimatch: dict) -> dict:
    """Supervision as UniMatch's authors have it: twice the labeled images (D25)."""
    return {
        **unimatch,
        "train.batch_size": 2 * unimatch["train.batch_size"],
        "train.group_size": 2 * unimatch["train.group_size"],
        "train.epoch_of": "labeled",
    }


# What a backbone brings whatever data set and method: UniMatch V2's decoder and
# optimizer for DINOv2; Segmenter's decoder and rate for augreg's transformers.
_DINOV2 = {
    "model.name": "dpt",
    # As many pixels as the paper's windows on layer1 (D27).
    "mpmc.windows": (1, 3, 7),
    "optimizer.name": "adamw",
    "optimizer.lr": 5e-6,
    "optimizer.head_multiplier": 40.0,
    "optimizer.weight_decay": 0.01,
    "optimizer.lag": 1,
}
_AUGREG = {
    "model.name": "segmenter",
    "mpmc.windows": (1, 3, 7),
    "model.drop_path": 0.1,
    "optimizer.lr": 1e-3,
    "optimizer.head_multiplier": 1.0,
    "optimizer.weight_decay": 0.0,
}
# Prefix of the backbone's name -> its settings, and the side of its patches.
FAMILIES = {"dinov2_": (_DINOV2, 14), "vit_": (_AUGREG, 16)}

PUBLISHED["voc"]["unimatch_v2"] = {
    **PUBLISHED["voc"]["unimatch"],
    "model.backbone": "dinov2_b14",
    "data.crop": 518,
    "train.batch_size": 16,
    "train.group_size": 4,
    "train.epochs": 60,
}
PUBLISHED["cityscapes"]["unimatch_v2"] = {
    **PUBLISHED["cityscapes"]["unimatch"],
    "model.backbone": "dinov2_b14",
    "data.crop": 798,
    "train.epochs": 180,
    "method.threshold": 0.95,
    "eval.protocol": "slide_ael",
}
for _methods in PUBLISHED.values():
    _unimatch = _methods["unimatch"]
    _methods["supervised"] = _baseline(_unimatch)
    # Published with UniMatch's settings; the mean teacher nobody published.
    _methods["fixmatch"] = _methods["mean_teacher"] = _unimatch
# UniMatch's. Nobody published the others, which have its data, optimizer, schedule and
# supervised loss (D22).
_ACDC = {
    "data.crop": 256,
    "data.geometry": "acdc",
    "data.normalization": "none",
    "method.supervised_loss": "ce_dice",
    "eval.protocol": "volume",
    "train.batch_size": 12,
    "train.group_size": 12,
    "train.epochs": 300,
    "optimizer.lr": 1e-2,
    "optimizer.head_multiplier": 1.0,
    "optimizer.weight_decay": 1e-4,
    "optimizer.lag": 1,
}
_UNIMATCH_ACDC = {
    **_ACDC,
    "data.partner": "other",
    "method.unlabeled_loss": "dice",
}
PUBLISHED["acdc"] = dict.fromkeys(METHODS, _ACDC) | {
    "supervised": _baseline(_ACDC),
    "unimatch": _UNIMATCH_ACDC,
    "fixmatch": _UNIMATCH_ACDC,
    # Cross-entropy of one batch with labeled images unlearns the small foreground, see
    # results/mean_teacher_acdc.
    "mean_teacher": {
        **_ACDC,
        "method.unlabeled_loss": "dice",
        "method.normalization": "apart",
    },
    "u2pl": {
        **_ACDC,
        "train.group_size": 4,
        "u2pl.low_rank": 1,
        "u2pl.high_rank": 4,
        "u2pl.contrast_weight": 1.0,
    },
    "ael": {
        **_ACDC,
        "train.group_size": 2,
        # As on VOC and Cityscapes, class 0 is never copied.
        "ael.unqueried": (0,),
        "ael.scale": 1.0,
    },
}


def _on_dinov2(unimatch_v2: dict, epochs: int, steps: int) -> dict[str, dict]:
    """What UniMatch V2's authors compare with, on its network, crop and schedule.

    Their supervision repeats the labeled list to 3000 images per epoch: `epochs` of
    `steps`. The mean teacher nobody published.
    """
    supervised = _baseline(unimatch_v2)
    del supervised["train.epoch_of"]
    return {
        "unimatch": unimatch_v2,
        "mean_teacher": unimatch_v2,
        "fixmatch": {
            **unimatch_v2,
            "fixmatch.teacher": "average",
            "method.ema_decay": 0.996,
        },
        # An evaluation for each of their epochs.
        "supervised": {
            **supervised,
            "train.steps": epochs * steps,
            "train.eval_every": steps,
        },
    }


# For backbone=dinov2_*.
ON_DINOV2 = {
    "voc": _on_dinov2(PUBLISHED["voc"]["unimatch_v2"], 60, 93),
    "cityscapes": _on_dinov2(PUBLISHED["cityscapes"]["unimatch_v2"], 180, 187),
}
# Where a published run of another crop differs: UniMatch's on the lists of U2PL, and
# what trains as UniMatch does.
AT_CROP = {
    ("voc", "unimatch", 513): {"train.group_size": 4},
    ("voc", "fixmatch", 513): {"train.group_size": 4},
    ("voc", "mean_teacher", 513): {"train.group_size": 4},
    ("voc", "supervised", 513): {"train.group_size": 8},
}


def parse(argument: str) -> dict[str, str]:
    """Text such as "a=1,b=2" as a dictionary.

    Raises:
      ValueError: a key that is not one of ours, or a part without "="; lists them.
    """
    values: dict[str, str] = {}
    last = ""
    for part in filter(None, argument.split(",")):
        key, found, value = part.partition("=")
        if found and key in _KEYS:
            values[key], last = value, key
        elif last == "lists":  # a comma in a folder's name
            values[last] += f",{part}"
        else:
            raise ValueError(
                f"{part!r} in the config argument: expected KEY=VALUE with KEY one of "
                f"{list(_KEYS)}"
            )
    return values


def _choose(table: dict, kind: str, name: str) -> dict:
    if name not in table:
        raise ValueError(
            f"{kind}={name!r} is unknown; {did_you_mean(name, table)}valid: "
            f"{sorted(table)}"
        )
    return table[name]


def _apply_family(config: ml_collections.ConfigDict) -> None:
    """Sets what the backbone brings; the crop becomes a multiple of its patches."""
    for prefix, (settings, patch) in FAMILIES.items():
        if config.model.backbone.startswith(prefix):
            config.update_from_flattened_dict(settings)
            config.data.crop -= config.data.crop % patch


def apply(
    config: ml_collections.ConfigDict, argument: str
) -> ml_collections.ConfigDict:
    """Sets a variant on a data set's configuration and returns it.

    Raises:
      ValueError: an unknown key, method or MPMC mode, the message lists the valid ones;
        a crop that is no number.
    """
    values = parse(argument)
    method = config.method.name = values.get("method", "unimatch")
    config.update_from_flattened_dict(_choose(METHODS, "method", method))
    published = PUBLISHED.get(config.data.name, {})
    if values.get("backbone", "").startswith("dinov2_"):
        published = {**published, **ON_DINOV2.get(config.data.name, {})}
    config.update_from_flattened_dict(published.get(method, {}))
    config.model.backbone = values.get("backbone", config.model.backbone)
    if values.get("model") != "unet":  # It has an encoder of its own.
        _apply_family(config)
    config.model.name = values.get("model", config.model.name)
    if "crop" in values:
        if not values["crop"].isdecimal():
            raise ValueError(f"crop={values['crop']!r} is no number of pixels")
        config.data.crop = int(values["crop"])
        at_crop = AT_CROP.get((config.data.name, method, config.data.crop), {})
        config.update_from_flattened_dict(at_crop)
    config.mpmc.update(_choose(MPMC, "mpmc", values.get("mpmc", "off")))
    if "split" in values:
        config.data.split = values["split"]
    if "lists" in values:
        folder = f"{values['lists']}/{config.data.split}"
        config.data.labeled_ids = f"{folder}/labeled.txt"
        config.data.unlabeled_ids = f"{folder}/unlabeled.txt"
    return config
