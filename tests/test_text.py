"""The text of messages."""

import fcntl
import io
import os
import struct
import termios

import pytest

from mpmc_jax.text import (
    bar_width,
    did_you_mean,
    first_line,
    has_control,
    printable,
    quantity,
    shorten,
)


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("a\x1b[31m\nb\u202e", keep="\n") == "a\\x1b[31m\nb\\u202e"
    assert printable("\udcb5\udcda1.png") == "\\xb5\\xda1.png"
    assert printable("\u56fe \u00e9 \\n") == "\u56fe \u00e9 \\n"
    assert shorten(["a\rb", "c\x07"]) == "a\\rb, c\\x07"
    assert has_control("a\nb") and has_control("\udcb5")
    assert not has_control("caf\u00e9 \u3000 1")


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "image", "1 image"), (2, "image", "2 images"), (0, "class", "0 classes")],
)
def test_a_noun_fits_its_number(number, noun, expected):
    assert quantity(number, noun) == expected


def test_the_closest_name_is_meant():
    valid = ["unimatch", "unimatch_v2", "cps"]
    assert did_you_mean("unimach", valid) == "did you mean 'unimatch'? "
    assert did_you_mean("zebra", valid) == ""


@pytest.mark.parametrize(
    ("columns", "expected"), [(0, {"ncols": 80}), (70, {"dynamic_ncols": True})]
)
def test_a_terminal_without_columns_has_a_bar_of_80(columns, expected):
    reader, writer = os.openpty()
    with os.fdopen(reader), os.fdopen(writer, "w") as terminal:
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
        assert bar_width(terminal) == expected
    assert bar_width(io.StringIO()) == {"dynamic_ncols": True}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(), "ValueError"),
        (ValueError("\n  first\x1b \nsecond"), "first\\x1b"),
        (ValueError("x" * 300), "x" * 200 + " ..."),
    ],
)
def test_an_error_is_shortened_to_one_line(error, expected):
    assert first_line(error) == expected
