"""The two errors that users see, and the exit statuses of the command line."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

MAX_QUOTED = 80  # characters of a foreign value in a message
MAX_LISTED = 5  # names in a message


class ExitStatus(IntEnum):
    """How a verb of the command line ended."""

    OK = 0
    # The answer is no: damage was found, a check failed.
    NO = 1
    # See InputError. argparse uses the same number.
    INPUT_ERROR = 2
    # See RunError.
    RUN_FAILED = 3
    # EX_SOFTWARE: the watchdog ended a job because a rank made no progress.
    HANG = 70
    # EX_TEMPFAIL: stopped on request; the same command resumes.
    STOPPED = 75


class InputError(ValueError):
    """A file, field or argument is wrong, and the message names it and the remedy.

    The command line prints the message without a traceback and exits with ExitStatus.INPUT_ERROR.
    """


class RunError(RuntimeError):
    """A run failed although its input was right: a full disk, a loss that is not finite.

    The message says what happened and how to resume. The command line prints it without a traceback
    and exits with ExitStatus.RUN_FAILED.
    """


def quoted(value: Any) -> str:
    """Return the repr of a foreign value for an error message, on one line and cut.

    It is quick for any value: lists in lists are not followed far.
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"<a whole number of {value.bit_length()} bits>"

    text = _SHORT.repr(value)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"


def first_of(names: Sequence[str], separator: str = ", ", most: int = MAX_LISTED) -> str:
    """Join the first of some names for a message, with … in the place of the others."""
    listed = separator.join(names[:most])
    return f"{listed}{separator}…" if len(names) > most else listed


def describe_error(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, cut to 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 4
        self.maxstring = self.maxother = MAX_QUOTED

    def repr_int(self, value: int, level: int) -> str:
        return quoted(value) if value.bit_length() > 256 else str(value)


_SHORT = _ShortRepr()
