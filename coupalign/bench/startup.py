"""`coupalign bench startup CONFIG`: time a training until its first step, and `coupalign --help`.

A training announces each phase that it begins (`watchdog.doing`) as an audit event. A child process
listens to these events and trains one step in a temporary folder. A second child does the same
under `-X importtime`, where Python prints the time of each import. These are added up by package
until the first step ends. What they do not explain of the phase "imports" is reported too.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import ClassVar

import torch

from coupalign.bench.machine import describe_machine, time_call
from coupalign.bench.result import Result, format_pairs, format_rows, format_values, prefixed
from coupalign.errors import InputError
from coupalign.files import read_json

_HELP_RUNS = 5
_SHOWN_PACKAGES = 12

# Phase names, as the child process and the training announce them.
_IMPORTS = "imports"
_FIRST_FORWARD = "step 1: forward"

# A child process prints each phase to standard error, after this mark.
_PHASE_MARK = "phase: "
_CHILD = f"""
import json, sys, time
times = [("python itself", float(sys.argv[1]))]
def note(name):
    times.append((name, time.time()))
    print("{_PHASE_MARK}" + name, file=sys.stderr, flush=True)
def listen(event, arguments):
    if event == "coupalign.doing":
        note(arguments[0])
sys.addaudithook(listen)
note("{_IMPORTS}")
from coupalign.cli.parser import main
status = main(sys.argv[3:])
times.append(("the end", time.time()))
with open(sys.argv[2], "w") as file:
    json.dump(times, file)
sys.exit(status)
"""


@dataclass(frozen=True, kw_only=True)
class StartupBench(Result):
    """Seconds until things have started.

    Attributes:
        help: of `coupalign --help`, the median of a few runs.
        phases: from the start of the process to the end of the first step, in order.
        imports: what a training imports until then, by top-level package. Each package is without
            the other packages that it imports.
        unaccounted: the part of the phase "imports" of that second run that is not an import:
            mostly reading the configuration.
    """

    bench: ClassVar[str] = "startup"

    help: float
    phases: dict[str, float]
    imports: dict[str, float]
    unaccounted: float

    def figures(self) -> dict[str, float]:
        """Return the figures to compare with an earlier result, by name."""
        return {
            "s --help": self.help,
            "s to the first step": sum(self.phases.values()),
            **prefixed("s ", self.phases),
        }

    def table(self) -> str:
        """Format the result for people."""
        slowest_first = sorted(self.imports.items(), key=lambda item: -item[1])
        shown, hidden = slowest_first[:_SHOWN_PACKAGES], slowest_first[_SHOWN_PACKAGES:]
        packages = {
            **dict(shown),
            f"{len(hidden)} more": sum(value for _, value in hidden),
            "together": sum(self.imports.values()),
            "rest of the phase, not imports": self.unaccounted,
        }
        phases = {**self.phases, "together": sum(self.phases.values())}

        lines = [
            format_pairs(self.machine),
            "",
            f"coupalign --help  {self.help:.2f} s",
            "",
            f"from the command to the end of the first step of {self.config}",
            _format_seconds(phases),
            "",
            "imports until then, by package, without the other packages that each imports "
            "(timed one by one, which slows them down)",
            _format_seconds(packages),
        ]
        return "\n".join(lines)


def _format_seconds(seconds: dict[str, float]) -> str:
    return indent(format_rows(format_values("{:.2f} s", seconds).items()), "  ")


def bench_startup(config: Path, overrides: Sequence[str]) -> StartupBench:
    """Measure the phases and imports of a training until its first step, and `coupalign --help`.

    Raises:
        InputError: the configuration cannot be trained here. The message ends with the training's
            own output.
    """
    begins, _ = _train_one_step(config, overrides)
    phases = _seconds_until_first_step(begins)

    help_command = [sys.executable, "-m", "coupalign", "--help"]
    help_seconds = []
    for _ in range(_HELP_RUNS):
        seconds, _ = time_call(
            lambda: subprocess.run(help_command, check=True, capture_output=True)
        )
        help_seconds.append(seconds)

    # Timing the imports slows them down, so their total is compared with the same run.
    begins, errors = _train_one_step(config, overrides, "-X", "importtime")
    imports = _import_seconds(errors)
    all_imports_s = _seconds_until_first_step(begins)[_IMPORTS]
    by_package: dict[str, float] = defaultdict(float)
    for seconds_of_phase in imports.values():
        for package, seconds in seconds_of_phase.items():
            by_package[package] += seconds

    return StartupBench(
        machine=describe_machine(torch.device("cpu")),
        config=config.stem,
        help=statistics.median(help_seconds),
        phases=phases,
        imports=dict(by_package),
        unaccounted=all_imports_s - sum(imports[_IMPORTS].values()),
    )


def _train_one_step(
    config: Path, overrides: Sequence[str], *python_options: str
) -> tuple[list[tuple[str, float]], str]:
    """Train one step in a child process.

    Returns:
        the name of each phase and when it began, in seconds since 1970; and what the child printed
        to standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        times_file, run_dir = Path(folder) / "times.json", Path(folder) / "run"
        arguments = [
            "train",
            str(config),
            *overrides,
            f"run_dir={run_dir}",
            "train.steps=1",
            "tracking.kind=none",
            "data.evaluate=[]",
        ]
        child = [sys.executable, *python_options, "-c", _CHILD, str(time.time()), str(times_file)]

        done = subprocess.run([*child, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"{config}: its training ended with status {done.returncode}:\n"
                f"{done.stderr[-2000:]}"
            )
        return read_json(times_file, "the times of a training"), done.stderr


def _seconds_until_first_step(begins: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return the seconds of each phase until the end of the first step."""
    seconds: dict[str, float] = defaultdict(float)
    for (name, began), (_, ended) in pairwise(begins):
        belongs_to_later_step = name.startswith("step ") and not name.startswith("step 1:")
        if not belongs_to_later_step:
            seconds[name.replace("step 1:", "first step:")] += ended - began
        if name.startswith(_FIRST_FORWARD):
            break
    return dict(seconds)


def _import_seconds(errors: str) -> dict[str, dict[str, float]]:
    """Add up import times until the end of the first step, by phase and top-level package.

    Args:
        errors: standard error of the child, with lines "import time: self | cumulative | name",
            in microseconds.
    """
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    phase = "python itself"
    for line in errors.splitlines():
        if line.startswith(_PHASE_MARK):
            if phase.startswith(_FIRST_FORWARD):
                break
            phase = line.removeprefix(_PHASE_MARK)
        elif match := re.match(r"import time: +(\d+) \| +\d+ \| +([\w.]+)", line):
            package = match[2].partition(".")[0]
            seconds[phase][package] += int(match[1]) / 1e6
    return seconds
