"""Read single fields of foreign annotation records. Each function refuses what it cannot read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from coupalign.errors import quoted

MAX_ID = 2**63 - 1  # ids are stored in int64

_NUMBER = re.compile(r"[0-9]{1,19}")


def field(record: Mapping[str, Any], name: str) -> Any:
    """Return a field that every record has.

    Raises:
        ValueError: this one has not.
    """
    if name not in record:
        raise ValueError(f"no field {name!r}")
    return record[name]


def read_number(value: Any, name: str) -> int:
    """Read an id or a size: a whole number, also as a text ("12") or as 12.0.

    Raises:
        ValueError: it is something else, or negative, or too large for an int64.
    """
    number = value
    if type(value) is str and _NUMBER.fullmatch(value):
        number = int(value)
    if type(value) is float and value.is_integer():
        number = int(value)

    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise ValueError(f"`{name}` is {quoted(value)}, not a whole number from 0 on")
    return number


def read_flag(value: Any, name: str) -> bool:
    """Read a yes or no: 0, 1, true, false, null, also as a text.

    Raises:
        ValueError: it is something else.
    """
    if value in (None, 0, 1):
        return bool(value)
    if type(value) is str and value.lower() in ("0", "1", "true", "false"):
        return value.lower() in ("1", "true")
    raise ValueError(f"`{name}` is {quoted(value)}, neither 0 nor 1")


def read_text(value: Any, name: str) -> str:
    """Read a text that can be written in UTF-8.

    Raises:
        ValueError: it is not a text, or half of a character is in it (a lone surrogate).
    """
    if type(value) is not str:
        raise ValueError(f"`{name}` is {quoted(value)}, not a text")
    try:
        value.encode("utf-8")
        return value
    except UnicodeEncodeError:
        pass

    # Some writers store a character as two surrogates. Join them.
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError(
            f"`{name}` is {quoted(value)}, which holds half of a character (a lone surrogate); "
            "write the whole character, or leave it out"
        ) from None


def read_positive(value: Any) -> float | None:
    """Read a number that is only compared with others; None if it is none, or not above 0."""
    is_number = type(value) in (int, float) and -MAX_ID <= value <= MAX_ID
    return float(value) if is_number and value > 0 else None


def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """Read a box [x, y, width, height] that is only compared; None if it is none or empty."""
    if type(value) is not list or len(value) != 4:
        return None
    if not all(type(side) in (int, float) and math.isfinite(_small(side)) for side in value):
        return None
    x, y, width, height = map(float, value)
    return (x, y, width, height) if width > 0 and height > 0 else None


def _small(value: int | float) -> float:
    return float(value) if -MAX_ID <= value <= MAX_ID else math.inf
