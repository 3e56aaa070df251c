"""Variants by string argument: what a method needs, and MPMC's modes.

`apply(config, argument)` reads "method=unimatch,mpmc=paper,split=1_8". What a data-set
file sets before is the ground that it stands on; --config.a.b=VALUE overrides
everything.
"""

import ml_collections

_KEYS = ("method", "mpmc", "split", "backbone", "model")

# "recommended": until measurements decide, the paper's method with a lambda_s of
# mean 1 (D4: as written it divides L_u by ten) and the cheap head (D16).
MPMC = {
    "off": {"enabled": False},
    "paper": {"enabled": True},
    "recommended": {"enabled": True, "lambda_scale": "mean", "head": "lite"},
}

# What a method needs whatever the data set.
METHODS = {
    "supervised": {},
    "mean_teacher": {"method.ema_decay": 0.999},
    "unimatch": {"optimizer.lag": 1},
    "augseg": {"method.ema_decay": 0.999},
}


def parse(argument: str) -> dict[str, str]:
    """Text such as "a=1,b=2" as a dictionary.

    Raises:
      ValueError: a key that is not one of ours, or a part without "="; lists them.
    """
    values = {}
    for part in filter(None, argument.split(",")):
        key, found, value = part.partition("=")
        if not found or key not in _KEYS:
            raise ValueError(
                f"{part!r} in the config argument: expected KEY=VALUE with KEY one of "
                f"{list(_KEYS)}"
            )
        values[key] = value
    return values


def _choose(table: dict, kind: str, name: str) -> dict:
    if name not in table:
        raise ValueError(f"{kind}={name!r} is unknown; valid: {sorted(table)}")
    return table[name]


def apply(
    config: ml_collections.ConfigDict, argument: str
) -> ml_collections.ConfigDict:
    """Sets a variant on a data set's configuration and returns it.

    Raises:
      ValueError: an unknown key, method or MPMC mode; the message lists the valid ones.
    """
    values = parse(argument)
    config.method.name = values.get("method", "unimatch")
    config.update_from_flattened_dict(_choose(METHODS, "method", config.method.name))
    config.mpmc.update(_choose(MPMC, "mpmc", values.get("mpmc", "off")))
    if "split" in values:
        config.data.split = values["split"]
    if "backbone" in values:
        config.model.backbone = values["backbone"]
    if "model" in values:
        config.model.name = values["model"]
    return config
