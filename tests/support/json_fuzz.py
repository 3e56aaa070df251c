"""Every JSON value of a file in turn made another, seeded."""

import functools
import json
import random
from collections.abc import Iterator
from typing import Any


def mutations(text: str, seed: int = 0) -> Iterator[tuple[tuple, str]]:
    """(place, text with another value there) for every place of a JSON value."""
    rng = random.Random(seed)
    for place in list(places(json.loads(text))):
        changed = json.loads(text)
        *above, key = place
        at = functools.reduce(lambda tree, each: tree[each], above, changed)
        value = at[key]
        odd = [None, [], {}, "odd", -1, 2**70, 1e308, True, [value], {"odd": value}]
        at[key] = rng.choice([each for each in odd if each != value])
        yield place, json.dumps(changed)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield (*path, key)
        if isinstance(each, dict | list):
            yield from places(each, (*path, key))
