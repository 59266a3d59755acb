"""The command line: `coupalign VERB …`. The flags and the body of each verb are in the other files.

Verbs import what they need in their bodies, so that `coupalign --help` is fast.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import coupalign
from coupalign.addresses import hide_secret
from coupalign.cli import bench, data, inspect, run
from coupalign.errors import ExitStatus, InputError, RunError

# Libraries that log every request.
_NOISY = ("httpx", "urllib3", "botocore", "aiobotocore", "alembic", "mlflow.store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status, see `errors.ExitStatus`.

    Args:
        arguments: what follows `coupalign`; None takes them from the process.
    """
    _print_any_text()
    options = parse_arguments(arguments)

    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(_MaskingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for library in _NOISY:
        logging.getLogger(library).setLevel(logging.WARNING)

    try:
        answer = options.run(options)
        if options.json and answer.value is not None:
            # There is no stdout where the shell closed it (>&-).
            encoding = getattr(sys.stdout, "encoding", None) or ""
            is_unicode = encoding.lower().startswith("utf")
            print(json.dumps(answer.value, ensure_ascii=not is_unicode))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be said
        return answer.status
    except InputError as error:
        print(f"coupalign: error: {_masked(error)}", file=sys.stderr)
        return ExitStatus.INPUT_ERROR
    except RunError as error:
        print(f"coupalign: the run failed: {_masked(error)}", file=sys.stderr)
        return ExitStatus.RUN_FAILED
    except BrokenPipeError:
        # The reader of the output, such as `head`, closed the pipe.
        _drop_output()
        return ExitStatus.NO
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = error.filename or "the output of this command"
        print(
            f"coupalign: the run failed: {place} cannot be written ({error.strerror}). Free some "
            "space, then run the same command again",
            file=sys.stderr,
        )
        _drop_output()
        return ExitStatus.RUN_FAILED


def _drop_output() -> None:
    """Send the rest of stdout nowhere: Python writes it once more at its exit, and complains."""
    with suppress(io.UnsupportedOperation, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _MaskingFormatter(logging.Formatter):
    """Masks the secrets of addresses in every log line, those of libraries as well."""

    def format(self, record: logging.LogRecord) -> str:
        return _masked(super().format(record))


def _masked(text: object) -> str:
    return hide_secret(str(text), os.environ.get("MLFLOW_TRACKING_URI"))


def _print_any_text() -> None:
    """Let the terminal escape what it cannot show: other alphabets in Latin-1, odd file names."""
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks replace them by streams that take everything.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, in which overrides (`key=value`) may stand anywhere after the verb.

    argparse itself accepts positional arguments only where they stand together.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)

    takes_overrides = hasattr(options, "overrides")
    are_overrides = all("=" in text and not text.startswith("-") for text in rest)
    if rest and not (takes_overrides and are_overrides):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    if rest:
        options.overrides = [*options.overrides, *rest]

    # A shell leaves the ~ of --out=~/x alone.
    for name, value in vars(options).items():
        if isinstance(value, Path) and value.parts[:1] == ("~",):
            setattr(options, name, value.expanduser())
    return options


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line. It sets `options.run` to the body of the verb."""
    parser = argparse.ArgumentParser(
        prog="coupalign",
        description="Referring image segmentation: pack data, train, score, predict.",
    )
    parser.add_argument("--version", action="version", version=f"coupalign {coupalign.__version__}")

    # In the order of `coupalign --help`.
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    data.add_synth(verbs)
    data.add_pack(verbs)
    data.add_verify(verbs)
    inspect.add_describe(verbs)
    inspect.add_plan(verbs)
    inspect.add_config(verbs)
    run.add_train(verbs)
    run.add_eval(verbs)
    run.add_compare(verbs)
    run.add_predict(verbs)
    run.add_reproduce(verbs)
    run.add_report(verbs)
    run.add_track(verbs)
    bench.add_bench(verbs)
    inspect.add_doctor(verbs)
    return parser
