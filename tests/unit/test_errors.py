"""Quoting foreign values and errors in messages."""

from __future__ import annotations

import pytest

from coupalign.errors import MAX_QUOTED, describe_error, first_of, quoted


def bomb() -> list:
    """A list that takes no memory, and whose repr has 2 ** 40 entries."""
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize("value", [12, 1.5, None, True, "a", [1, 2], {"a": 1}, "café"])
def test_short_values_are_quoted_whole(value: object) -> None:
    assert quoted(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    [bomb(), {"a": bomb()}, "x" * 10**6, [10**5000], 10**5000, -(10**5000), b"x" * 1000],
    ids=["bomb", "bomb in dict", "text", "list of a number", "number", "negative", "bytes"],
)
def test_large_values_are_cut(value: object) -> None:
    assert len(quoted(value)) <= MAX_QUOTED


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "half \ud83d", "\u2028"])
def test_quoted_text_is_one_printable_line(text: str) -> None:
    assert quoted(text).isprintable()


def test_description_of_an_error_is_one_short_line() -> None:
    assert describe_error(MemoryError()) == "MemoryError"
    assert describe_error(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert len(describe_error(RuntimeError("x" * 10_000))) < 250


def test_more_names_than_fit_end_with_dots() -> None:
    assert first_of(["a", "b"], most=2) == "a, b"
    assert first_of(["a", "b", "c"], "; ", most=2) == "a; b; …"
