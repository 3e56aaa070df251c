"""The text of messages."""

import pytest

from mpmc_jax.text import first_line, has_control, printable, quantity, shorten


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
