"""`coupalign bench startup CONFIG`: what passes before a training's first step, and before a person sees `--help`.

A training says what it begins (`watch.doing`), which is an audit event: a child process that listens to them trains one step in a
folder that is thrown away. Import times are Python's own (`-X importtime`), added up by package.
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
_SHOWN = 12      # packages
_TRAIN = """
import json, sys, time
times = [("python itself", float(sys.argv[1]))]
sys.addaudithook(lambda event, words: times.append((words[0], time.time())) if event == "coupalign.doing" else None)
times.append(("imports", time.time()))
from coupalign.cli import main
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
        imports: by top-level package, what a training imports; each without what it imports from others.
    """

    bench: ClassVar[str] = "startup"

    machine: dict[str, str]
    config: str
    help: float
    phases: dict[str, float]
    imports: dict[str, float]

    def figures(self) -> dict[str, float]:
        """What is compared with an earlier result, by name."""
        return {"s --help": self.help, "s to the first step": sum(self.phases.values()),
                **{f"s {name}": value for name, value in self.phases.items()}}

    def table(self) -> str:
        """The same for people."""
        lines = ["  ".join(f"{name} {value}" for name, value in self.machine.items()), "", f"coupalign --help{self.help:>28.2f} s", "",
                 f"from nothing to the end of the first step of {self.config}"]
        lines += [f"  {name:<40}{value:>8.2f} s" for name, value in {**self.phases, "together": sum(self.phases.values())}.items()]
        most = sorted(self.imports.items(), key=lambda item: -item[1])
        lines += ["", "imports of a training, by package, each without what it imports itself"]
        lines += [f"  {name:<40}{value:>8.2f} s" for name, value in most[:_SHOWN]]
        return "\n".join([*lines, f"  {f'{len(most) - _SHOWN} more':<40}{sum(value for _, value in most[_SHOWN:]):>8.2f} s"])


def bench_startup(config: Path, overrides: Sequence[str]) -> StartBench:
    """Start things and watch.

    Raises:
        InputError: the configuration cannot be trained here; the message ends with what the training said.
    """
    phases = _phases(config, overrides)
    helps = [_seconds([sys.executable, "-m", "coupalign", "--help"]) for _ in range(_HELPS)]
    imports = _imports("coupalign.verbs, coupalign.training.loop, coupalign.engine.build, coupalign.tracking, transformers, timm")
    return StartBench(describe_machine(torch.device("cpu")), config.stem, statistics.median(helps), phases, imports)


def _phases(config: Path, overrides: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        found, run = Path(folder) / "times.json", Path(folder) / "run"
        words = ["train", str(config), *overrides, f"run_dir={run}", "train.steps=1", "tracking.kind=none", "data.evaluate=[]"]
        done = subprocess.run([sys.executable, "-c", _TRAIN, str(time.time()), str(found), *words], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{config}: its training ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        times = json.loads(found.read_text())
    phases: dict[str, float] = defaultdict(float)
    for (name, began), (_, ended) in zip(times, times[1:]):
        if name.startswith("step 1:") or not name.startswith("step "):
            phases[name.replace("step 1:", "first step:")] += ended - began
        if name.startswith("step 1: forward"):
            break
    return dict(phases)


def _imports(modules: str) -> dict[str, float]:
    """Seconds by top-level package, from the lines "import time: self | cumulative | name"; microseconds."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", f"import {modules}"], capture_output=True, text=True, check=True)
    found: dict[str, float] = defaultdict(float)
    for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)", done.stderr, re.MULTILINE):
        found[name.partition(".")[0]] += int(own) / 1e6
    return dict(found)


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began
