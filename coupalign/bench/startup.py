"""`coupalign bench startup CONFIG`: what passes before a training's first step, and before a person sees `--help`.

A training says what it begins (`watch.doing`), which is an audit event: a child process that listens to them trains one step in a
folder that is thrown away. A second child does the same under `-X importtime`, Python's own times of imports, which are added up by
package until that step ends; what they do not explain of the phase "imports" is said.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from coupalign.bench.machine import Result, describe_machine
from coupalign.errors import InputError

_HELPS = 5
_SHOWN = 12  # packages
_MARK = "phase: "
_TRAIN = f"""
import json, sys, time
times = [("python itself", float(sys.argv[1]))]
def note(name):
    times.append((name, time.time()))
    print("{_MARK}" + name, file=sys.stderr, flush=True)
sys.addaudithook(lambda event, words: note(words[0]) if event == "coupalign.doing" else None)
note("imports")
from coupalign.cli.parser import main
status = main(sys.argv[3:])
times.append(("the end", time.time()))
with open(sys.argv[2], "w") as file:
    json.dump(times, file)
sys.exit(status)
"""


@dataclass(frozen=True)
class StartBench(Result):
    """Seconds.

    Attributes:
        help: of `coupalign --help`, the median of a few.
        phases: from the start of the process to the end of the first step, in order.
        imports: by top-level package, what a training imports until then; each without what it imports from others.
        unaccounted: of the phase "imports" of that second run, what is no import: above all the reading of the
            configuration and the end of a collection.
    """

    bench: ClassVar[str] = "startup"

    machine: dict[str, str]
    config: str
    help: float
    phases: dict[str, float]
    imports: dict[str, float]
    unaccounted: float

    def figures(self) -> dict[str, float]:
        """What is compared with an earlier result, by name."""
        return {
            "s --help": self.help,
            "s to the first step": sum(self.phases.values()),
            **{f"s {name}": value for name, value in self.phases.items()},
        }

    def table(self) -> str:
        """The same for people."""
        lines = [
            "  ".join(f"{name} {value}" for name, value in self.machine.items()),
            "",
            f"coupalign --help{self.help:>28.2f} s",
            "",
            f"from nothing to the end of the first step of {self.config}",
        ]
        lines += [
            f"  {name:<40}{value:>8.2f} s"
            for name, value in {**self.phases, "together": sum(self.phases.values())}.items()
        ]
        most = sorted(self.imports.items(), key=lambda item: -item[1])
        lines += [
            "",
            "imports until then, by package, each without what it imports itself (timed one by one, which makes them slower)",
        ]
        lines += [
            f"  {name:<40}{value:>8.2f} s"
            for name, value in [
                *most[:_SHOWN],
                (f"{len(most) - _SHOWN} more", sum(value for _, value in most[_SHOWN:])),
                ("together", sum(self.imports.values())),
                ("of the phase, no import", self.unaccounted),
            ]
        ]
        return "\n".join(lines)


def bench_startup(config: Path, overrides: Sequence[str]) -> StartBench:
    """Start things and watch.

    Raises:
        InputError: the configuration cannot be trained here; the message ends with what the training said.
    """
    phases = _until_first_step(_train(config, overrides)[0])
    helps = [_seconds([sys.executable, "-m", "coupalign", "--help"]) for _ in range(_HELPS)]
    times, said = _train(config, overrides, "-X", "importtime")
    imports = _imports(said)
    together: dict[str, float] = defaultdict(float)
    for of_phase in imports.values():
        for name, value in of_phase.items():
            together[name] += value
    unaccounted = _until_first_step(times)["imports"] - sum(imports["imports"].values())
    return StartBench(
        describe_machine(torch.device("cpu")),
        config.stem,
        statistics.median(helps),
        phases,
        dict(together),
        unaccounted,
    )


def _train(
    config: Path, overrides: Sequence[str], *options: str
) -> tuple[list[tuple[str, float]], str]:
    """Train one step; when each phase began, seconds since 1970, and what was printed to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        found, run = Path(folder) / "times.json", Path(folder) / "run"
        words = [
            "train",
            str(config),
            *overrides,
            f"run_dir={run}",
            "train.steps=1",
            "tracking.kind=none",
            "data.evaluate=[]",
        ]
        command = [sys.executable, *options, "-c", _TRAIN, str(time.time()), str(found), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"{config}: its training ended with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        return json.loads(found.read_text()), done.stderr


def _until_first_step(times: Sequence[tuple[str, float]]) -> dict[str, float]:
    phases: dict[str, float] = defaultdict(float)
    for (name, began), (_, ended) in zip(times, times[1:]):
        if name.startswith("step 1:") or not name.startswith("step "):
            phases[name.replace("step 1:", "first step:")] += ended - began
        if name.startswith("step 1: forward"):
            break
    return dict(phases)


def _imports(said: str) -> dict[str, dict[str, float]]:
    """By phase and top-level package, from the lines "import time: self | cumulative | name", µs; to the end of the first step."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    phase = "python itself"
    for line in said.splitlines():
        if line.startswith(_MARK):
            if phase.startswith("step 1: forward"):
                break
            phase = line.removeprefix(_MARK)
        elif timed := re.match(r"import time: +(\d+) \| +\d+ \| +([\w.]+)", line):
            found[phase][timed[2].partition(".")[0]] += int(timed[1]) / 1e6
    return found


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began
