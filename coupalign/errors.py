"""The two errors that users see, and the exit statuses of the command line."""

from __future__ import annotations

from enum import IntEnum


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
