"""The runs of a table: which there must be, where they lie, and how they are brought about, here or as arrays of Slurm.

A run is `runs/<configuration>[-<variant>]-s<seed>`, whichever table asks for it, so tables share what they have in common.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coupalign.config.load import numeric_diff, read_config
from coupalign.config.schema import Config
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import read_recipe
from coupalign.data.refshapes.generate import synth
from coupalign.errors import InputError
from coupalign.files import whole_file
from coupalign.reproduce.spec import Table, TableRow

CONFIGS, RUNS = Path("configs"), Path("runs")
SWEEP, RECIPE = Path("slurm/sweep.sbatch"), Path("shards/recipes/refshapes.yaml")
SHAPES = {
    "small": ("refshapes", 6600),
    "tiny": ("refshapes_tiny", 400),
}  # scale -> configuration, scenes to generate
STOPPED = 75
_SPLITS_OF_SHAPES = ("val", "testA", "testB")


@dataclass(frozen=True)
class PlannedRun:
    """One training: a configuration file, what is changed in it, and a seed."""

    config: Path
    overrides: tuple[str, ...]
    seed: int
    splits: tuple[str, ...]  # to score

    @property
    def variant(self) -> str:
        """What tells the runs of one configuration apart: "count-50-s0"."""
        keys = (change.partition("=") for change in self.overrides)
        changes = [
            re.sub(r"[^\w.+]+", "-", f"{key.rpartition('.')[2]}-{value}").strip("-")
            for key, _, value in keys
        ]
        return "-".join([*changes, f"s{self.seed}"])

    @property
    def directory(self) -> Path:
        return RUNS / f"{self.config.stem}-{self.variant}"

    @property
    def own_changes(self) -> tuple[str, ...]:
        """All that is changed in the configuration file for this run."""
        return (*self.overrides, f"seed={self.seed}", f"name={self.directory.name}")


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its status (0: there are scores), the time it took and the file with what it said."""

    run: PlannedRun
    status: int
    seconds: float
    log: Path


def plan_runs(
    table: Table, scale: str | None, seeds: int
) -> list[tuple[TableRow, list[PlannedRun]]]:
    """For each row its runs, none for one that is not in the harness.

    Args:
        scale: of RefShapes, a key of `SHAPES`; none: the real data.

    Raises:
        InputError: no row has anything to run, or a configuration file is missing.
    """
    planned = []
    for row in table.rows:
        columns = [
            column for column in table.columns if scale or column in row.paper or not row.paper
        ]
        splits = tuple(dict.fromkeys(column.partition(" ")[0] for column in columns))
        if scale:
            splits = tuple(split for split in splits if split in _SPLITS_OF_SHAPES)
            made = row.shapes is not None and (CONFIGS / f"{SHAPES[scale][0]}.yaml", row.shapes)
        else:
            made = row.config is not None and (CONFIGS / row.config, ())
        planned.append(
            (row, [PlannedRun(*made, seed, splits) for seed in range(seeds)] if made else [])
        )
    if not any(runs for _, runs in planned):
        raise InputError(
            f"{table.title!r} has no row for {'RefShapes' if scale else 'real data'}; "
            f"{'leave --data refshapes out' if scale else 'add --data refshapes'}"
        )
    return planned


def make_shapes(scale: str) -> None:
    """Generate and pack the RefShapes of a scale, where they are not there yet."""
    name, images = SHAPES[scale]
    folder = Path("data") / name
    synth(folder / "refshapes", images, 0, "easy", 96, 2)
    print(
        pack(
            read_recipe(RECIPE, [f"root={folder / 'refshapes'}"]), folder / "shards", workers=2
        ).table(),
        flush=True,
    )


def run_all(
    runs: Sequence[PlannedRun],
    changes: Sequence[str] = (),
    launcher: Sequence[str] = (),
    jobs: int = 1,
) -> list[RunResult]:
    """Train and score each run that has not been; the output of run X goes to runs/X.log.

    Args:
        changes: overrides for all of them.
        launcher: what starts a verb on all ranks (["launch/deepspeed.sh"]); none: one process.
        jobs: runs at a time.

    Raises:
        InputError: a directory holds the run of another configuration; names the fields.
        KeyboardInterrupt: it was asked to stop; the runs have saved what they had.
    """
    runs = list(dict.fromkeys(runs))
    for run in runs:
        check_same(run, changes)
    with (
        _Children(list(launcher) or [sys.executable, "-m", "coupalign"], jobs) as children,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def one(place: int) -> RunResult:
            return children.bring_about(
                runs[place], changes, f"[{place + 1}/{len(runs)}] {runs[place].directory}"
            )

        return list(pool.map(one, range(len(runs))))


def is_done(run: PlannedRun, config: Config) -> bool:
    """Whether the run has all the scores that the table asks for."""
    return all(
        (run.directory / "scores" / f"{split}-{config.evaluate.protocol}.json").is_file()
        for split in run.splits
    )


def config_of(run: PlannedRun, changes: Sequence[str] = ()) -> Config:
    """The whole configuration of a run."""
    config = read_config(run.config, [*changes, *run.own_changes])
    if config.run_dir:
        raise InputError(
            f"run_dir = {config.run_dir}: the runs of a table lie in {RUNS}/, each under its own name; leave it out"
        )
    return config


def check_same(run: PlannedRun, changes: Sequence[str]) -> None:
    """Refuse scores of another configuration under this run's name."""
    file = run.directory / "config.yaml"
    wanted = config_of(run, changes)
    if not file.is_file():
        return
    other = numeric_diff(read_config(file), wanted)
    if other:
        told = "; ".join(
            f"{key} is {old!r} there, {new!r} here" for key, (old, new) in list(other.items())[:4]
        )
        raise InputError(
            f"{run.directory}: holds the run of another configuration: {told}. Move it away, or call this command in "
            "another folder"
        )


class _Children:
    """The processes that run now; one that is told to stop tells all of them, and waits until they have saved."""

    def __init__(self, launcher: list[str], jobs: int) -> None:
        self.launcher, self.jobs = launcher, jobs
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> _Children:
        self.before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.stopping.is_set():
            raise KeyboardInterrupt

    def bring_about(self, run: PlannedRun, changes: Sequence[str], title: str) -> RunResult:
        """Train, then score, unless the scores are there."""
        log = run.directory.with_name(f"{run.directory.name}.log")
        began = time.monotonic()
        if is_done(run, config_of(run, changes)):
            print(f"{title}: has its scores", flush=True)
            return RunResult(run, 0, 0.0, log)
        words = [*changes, *run.own_changes]
        splits = [word for split in run.splits for word in ("--split", split)]
        status = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as output:
            for verb, arguments in (
                ("train", [run.config, *words]),
                ("eval", [run.directory, *splits, "--language-blind", "--pictures", "6"]),
            ):
                if status == 0 and not self.stopping.is_set():
                    print(f"{title}: {verb}", flush=True)
                    status = self._call([*self.launcher, verb, *map(str, arguments)], output)
        if self.stopping.is_set():
            return RunResult(run, STOPPED, time.monotonic() - began, log)
        seconds = time.monotonic() - began
        ended = "done" if status == 0 else f"status {status}: {_last_words(log)}; all of it: {log}"
        print(f"{title}: {ended}, {seconds:.0f} s", flush=True)
        return RunResult(run, status, seconds, log)

    def _call(self, command: list[str], output: object) -> int:
        threads = (
            {}
            if self.jobs == 1
            else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        )
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ},
            process_group=0,
        )
        self.running.add(process)
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def _stop(self, *_: object) -> None:
        self.stopping.set()
        print(
            "stopping: the runs save what they have; the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        for process in tuple(self.running):
            os.killpg(process.pid, signal.SIGTERM)


def _last_words(log: Path) -> str:
    """The error that a run ended with, else its last line."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace")
        .replace("\r", "\n")
        .splitlines()
        if line.strip()
    ]
    errors = [
        line.removeprefix("coupalign: error: ")
        for line in lines
        if line.startswith("coupalign: error: ")
    ]
    return (errors or lines or ["nothing was said"])[-1]


def submit(
    runs: Sequence[PlannedRun], changes: Sequence[str], options: str, folder: Path
) -> list[list[str]]:
    """Hand the runs that have no scores yet to Slurm, an array for each configuration; returns the commands that were called.

    Args:
        options: for sbatch: nodes, GPUs, time.
        folder: where the lists of variants are kept.

    Raises:
        InputError: sbatch is not there, or refuses.
    """
    commands = []
    waiting = [run for run in dict.fromkeys(runs) if not is_done(run, config_of(run, changes))]
    (RUNS / "slurm").mkdir(parents=True, exist_ok=True)
    for config in dict.fromkeys(run.config for run in waiting):
        own = [run for run in waiting if run.config == config]
        for run in own:
            check_same(run, changes)
        sweep = folder / f"{config.stem}.txt"
        with whole_file(sweep, "w") as file:
            file.writelines(
                shlex.join([run.variant, *run.overrides, f"seed={run.seed}"]) + "\n" for run in own
            )
        splits = " ".join(dict.fromkeys(split for run in own for split in run.splits))
        commands.append(
            [
                "sbatch",
                "--array",
                f"0-{len(own) - 1}",
                *shlex.split(options),
                str(SWEEP),
                str(sweep),
                str(config),
                *changes,
            ]
        )
        _sbatch(commands[-1], splits)
    return commands


def _sbatch(command: Sequence[str], splits: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COUPALIGN_SPLITS": splits}
        )
    except FileNotFoundError:
        raise InputError(
            "--slurm: there is no sbatch here; call it on a login node of the cluster"
        ) from None
    if done.returncode:
        raise InputError(f"--slurm: sbatch refused: {done.stderr.strip()}\n{shlex.join(command)}")
    print(done.stdout.strip(), flush=True)
