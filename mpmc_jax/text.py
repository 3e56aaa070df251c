"""Words of messages."""


def quantity(number: int, noun: str) -> str:
    """A number and its noun: "1 image", "2 images", "0 classes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'ch', 'x')) else 's'}"
