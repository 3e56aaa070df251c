"""Checks of method settings; each raises ValueError for a setting out of range."""

from collections.abc import Collection


def check_partners(method: str, group_size: int, hint: str = "") -> None:
    """Raises ValueError if a group has no second image to mix with."""
    if group_size < 2:
        raise ValueError(
            f"{method} mixes each image with another one of its group, but "
            f"train.group_size={group_size} leaves no other image; use a group of at "
            f"least 2{hint}"
        )


def check_reversed(method: str, group_size: int) -> None:
    """Raises ValueError if reversing a group leaves an image where it was."""
    if group_size % 2:
        raise ValueError(
            f"{method} mixes image i of a group with image n-1-i; with "
            f"train.group_size={group_size} the middle image would be mixed with "
            "itself; use an even group"
        )


def check_average(method: str, decay: float, published: float) -> None:
    """Raises ValueError unless the teacher's `decay` is between 0 and 1."""
    if not 0 < decay < 1:
        raise ValueError(
            f"{method}'s teacher is an average, but method.ema_decay={decay} is not "
            f"between 0 and 1; published runs use {published}"
        )


def check_choice(key: str, value: str, valid: Collection[str]) -> None:
    """Raises ValueError, listing the valid values, for any other value."""
    if value not in valid:
        raise ValueError(f"{key}={value!r} is unknown; valid: {sorted(valid)}")


def check_share(key: str, value: float) -> None:
    """Raises ValueError unless a setting is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={value}: must lie in [0, 1]")


def check_count(key: str, value: int) -> None:
    """Raises ValueError unless a setting is at least 1."""
    if value < 1:
        raise ValueError(f"{key}={value}: must be at least 1")


def check_positive(key: str, value: float) -> None:
    """Raises ValueError unless a setting is positive."""
    if value <= 0:
        raise ValueError(f"{key}={value}: must be positive")


def check_optional_decay(decay: float) -> None:
    """Raises ValueError unless `decay` is in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(
            f"method.ema_decay={decay} is not in [0, 1); 0 keeps no average"
        )
