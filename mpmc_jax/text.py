"""Text of messages: counts, short lists, names that are safe on a terminal."""

import difflib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

# Unicode categories: control characters, line and paragraph separators, and the lone
# surrogates that stand for bytes of a name that are not UTF-8.
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
# Formatting characters (writing direction) change how the rest of a line looks.
_ESCAPED = (*_CONTROL, "Cf")


def quantity(number: int, noun: str) -> str:
    """Returns a number and its noun: "1 image", "2 images", "0 classes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'ch', 'x')) else 's'}"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns "did you mean 'NAME'? " with the closest valid name, or ""."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}? " if close else ""


def bar_width(terminal: TextIO) -> dict[str, Any]:
    """Returns tqdm's arguments for the width of a progress bar.

    Some terminals, such as those of `script` and of containers, say that they have no
    columns; tqdm would draw nothing there.
    """
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):  # no terminal, or a stream without a file
        return {"dynamic_ncols": True}
    return {"dynamic_ncols": True} if columns else {"ncols": 80}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a Markdown table: a line for the head, for the rule, for each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def has_control(name: str) -> bool:
    """Returns whether a name has line ends, control characters or non-UTF-8 bytes."""
    return any(unicodedata.category(char) in _CONTROL for char in name)


def printable(text: object, keep: str = "") -> str:
    """Returns a text with the characters that control a terminal escaped.

    Args:
      text: an object; its string is used.
      keep: characters that are not escaped, such as a line end.
    """
    return "".join(
        char
        if char in keep or unicodedata.category(char) not in _ESCAPED
        else _escape(char)
        for char in str(text)
    )


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def first_line(error: BaseException, limit: int | None = 200) -> str:
    """Returns the first line of an error's message, or its type where it has none.

    Args:
      error: the error.
      limit: characters after which the line is cut; None keeps all.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = printable(lines[0].rstrip())
    return line if limit is None or len(line) <= limit else f"{line[:limit]} ..."


def shorten(items: list, limit: int = 5) -> str:
    """Formats a list for a message: the first few items and the number of others."""
    text = ", ".join(map(printable, items[:limit]))
    rest = len(items) - limit
    return text if rest <= 0 else f"{text} and {rest} more"
