"""The two errors a user may see, and the exit statuses of the command line."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a verb of the command line ended."""

    OK = 0
    NO = 1  # the answer is no: damage was found, a check failed
    INPUT_ERROR = 2  # see InputError; argparse uses the same number
    RUN_FAILED = 3  # see RunError
    HANG = 70  # EX_SOFTWARE: the watchdog ended a job whose ranks no longer met
    STOPPED = 75  # EX_TEMPFAIL: stopped on request; the same command resumes


class InputError(ValueError):
    """A file, field or argument that the user can fix. The message names it and the remedy.

    The command line prints the message without a traceback and exits with ExitStatus.INPUT_ERROR.
    """


class RunError(RuntimeError):
    """A run that failed although its input was right: a full disk, a loss that is not finite.

    The message says what happened and how to resume. The command line prints it without a traceback
    and exits with ExitStatus.RUN_FAILED.
    """
