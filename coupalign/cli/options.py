"""What the verbs of the command line share: how they answer, and the flags of several of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.errors import ExitStatus


@dataclass(frozen=True)
class Answer:
    """How a verb ended.

    Attributes:
        value: what `--json` prints; None prints nothing, as on all ranks but the first.
        status: the exit status of the process.
    """

    value: Any = None
    status: ExitStatus = ExitStatus.OK


def ok_or_no(ok: bool) -> ExitStatus:
    """The status of a check: OK if it passed, NO if it did not."""
    return ExitStatus.OK if ok else ExitStatus.NO


def add_verb(
    verbs: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    summary: str,
) -> argparse.ArgumentParser:
    """Add a verb with the flags that every verb has; `run` is its body. Returns its parser."""
    parser = verbs.add_parser(name, help=summary, description=summary)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    # The deepspeed launcher adds this flag.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)
    return parser


def add_file_and_overrides(
    parser: argparse.ArgumentParser,
    name: str = "config",
    description: str = "YAML file, see configs/",
    optional: bool = False,
) -> None:
    """Add a positional file and the `key=value` overrides that may follow it."""
    parser.add_argument(name, type=Path, help=description, nargs="?" if optional else None)
    add_overrides(parser, "settings to change in the file, by dotted key")


def add_overrides(parser: argparse.ArgumentParser, description: str) -> None:
    """Add the positional `key=value` overrides."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=description)
