"""Plan the runs of a table, then train and score them here or as Slurm arrays.

A run is `runs/<configuration>[-<variant>]-s<seed>`, whichever table asks for it, so tables share
runs."""

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

from coupalign.config.load import numeric_diff, read_config, read_stored_config
from coupalign.config.schema import Config
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import read_recipe
from coupalign.data.refshapes.generate import synth
from coupalign.errors import ExitStatus, InputError
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import rows_path
from coupalign.files import whole_file
from coupalign.reproduce.spec import Table, TableRow

CONFIGS = Path("configs")
RUNS = Path("runs")
SWEEP = Path("slurm/sweep.sbatch")
RECIPE = Path("shards/recipes/refshapes.yaml")

# Scale of RefShapes: name of the configuration and number of scenes to generate.
SHAPES = {"small": ("refshapes", 6600), "tiny": ("refshapes_tiny", 400)}

_SPLITS_OF_SHAPES = ("val", "testA", "testB")


@dataclass(frozen=True)
class PlannedRun:
    """One training: a configuration file, its overrides and a seed. `splits` are to be scored."""

    config: Path
    overrides: tuple[str, ...]
    seed: int
    splits: tuple[str, ...]

    @property
    def variant(self) -> str:
        """The name that tells the runs of one configuration apart: "count-50-s0"."""
        names = []
        for override in self.overrides:
            key, _, value = override.partition("=")
            field = key.rpartition(".")[2]
            names.append(re.sub(r"[^\w.+]+", "-", f"{field}-{value}").strip("-"))
        return "-".join([*names, f"s{self.seed}"])

    @property
    def directory(self) -> Path:
        """The run directory."""
        return RUNS / f"{self.config.stem}-{self.variant}"

    @property
    def own_changes(self) -> tuple[str, ...]:
        """All overrides of the configuration file for this run."""
        return (*self.overrides, f"seed={self.seed}", f"name={self.directory.name}")


@dataclass(frozen=True)
class RunResult:
    """How a run ended: exit status (0: it has scores), seconds, and the file with its output."""

    run: PlannedRun
    status: int
    seconds: float
    log: Path


def plan_runs(
    table: Table, scale: str | None, seeds: int
) -> list[tuple[TableRow, list[PlannedRun]]]:
    """Plan the runs of each row. A row that is not in the harness has none.

    Args:
        scale: of RefShapes, a key of `SHAPES`. None: the real data.

    Raises:
        InputError: no row has anything to run, or a configuration file is missing.
    """
    planned = []
    for row in table.rows:
        if scale:
            runs = _runs_on_shapes(row, table, scale, seeds)
        else:
            runs = _runs_on_real_data(row, table, seeds)
        planned.append((row, runs))

    if not any(runs for _, runs in planned):
        data, remedy = "real data", "add --data refshapes"
        if scale:
            data, remedy = "RefShapes", "leave --data refshapes out"
        raise InputError(f"{table.title!r} has no row for {data}; {remedy}")
    return planned


def _runs_on_shapes(row: TableRow, table: Table, scale: str, seeds: int) -> list[PlannedRun]:
    if row.shapes is None:
        return []

    splits = [split for split in _splits(table.columns) if split in _SPLITS_OF_SHAPES]
    config = CONFIGS / f"{SHAPES[scale][0]}.yaml"
    return [PlannedRun(config, row.shapes, seed, tuple(splits)) for seed in range(seeds)]


def _runs_on_real_data(row: TableRow, table: Table, seeds: int) -> list[PlannedRun]:
    if row.config is None:
        return []

    # Only the splits with a published number, or all if the row has none.
    columns = [column for column in table.columns if column in row.paper or not row.paper]
    config = CONFIGS / row.config
    return [PlannedRun(config, (), seed, _splits(columns)) for seed in range(seeds)]


def _splits(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the splits of columns such as "val oIoU", each once, in order."""
    return tuple(dict.fromkeys(column.partition(" ")[0] for column in columns))


def make_shapes(scale: str) -> None:
    """Generate and pack RefShapes at a scale, unless it exists."""
    name, images = SHAPES[scale]
    folder = Path("data") / name
    synth(folder / "refshapes", images, seed=0, level="easy", size=96, workers=2)
    recipe = read_recipe(RECIPE, [f"root={folder / 'refshapes'}"])
    report = pack(recipe, folder / "shards", workers=2)
    print(report.table(), flush=True)


def run_all(
    runs: Sequence[PlannedRun],
    changes: Sequence[str] = (),
    launcher: Sequence[str] = (),
    jobs: int = 1,
) -> list[RunResult]:
    """Train and score each run that has no scores. The output of run X goes to runs/X.log.

    Args:
        changes: overrides for all runs.
        launcher: the command that starts a verb on all ranks (["launch/deepspeed.sh"]).
            Default: one process.
        jobs: number of runs at a time.

    Raises:
        InputError: a directory holds the run of another configuration. The message names the
            fields.
        KeyboardInterrupt: a stop was requested, and the runs have saved.
    """
    runs = list(dict.fromkeys(runs))
    for run in runs:
        refuse_other_configuration(run, changes)

    command = list(launcher) or [sys.executable, "-m", "coupalign"]
    with _ChildProcesses(command, jobs) as children, ThreadPoolExecutor(jobs) as pool:
        results = []
        for number, run in enumerate(runs, 1):
            title = f"[{number}/{len(runs)}] {run.directory}"
            results.append(pool.submit(children.train_and_score, run, changes, title))
        return [result.result() for result in results]


def is_done(run: PlannedRun, config: Config) -> bool:
    """Tell whether the run has all the scores that the table asks for."""
    protocol = find_protocol(config.evaluate.protocol)
    for split in run.splits:
        rows = rows_path(run.directory, split, protocol.name, protocol.sentences)
        if not rows.with_suffix(".json").is_file():
            return False
    return True


def config_of(run: PlannedRun, changes: Sequence[str] = ()) -> Config:
    """Read the whole configuration of a run."""
    config = read_config(run.config, [*changes, *run.own_changes])
    if config.run_dir:
        raise InputError(
            f"run_dir = {config.run_dir}: the runs of a table are in {RUNS}/, each under its own "
            "name; leave it out"
        )
    return config


def refuse_other_configuration(run: PlannedRun, changes: Sequence[str]) -> None:
    """Raise InputError if the run directory holds a run of another configuration."""
    wanted = config_of(run, changes)
    file = run.directory / "config.yaml"
    if not file.is_file():
        return

    differences = numeric_diff(read_stored_config(file), wanted)
    if differences:
        listing = [
            f"{key} is {old!r} there, {new!r} here" for key, (old, new) in differences.items()
        ]
        raise InputError(
            f"{run.directory}: holds the run of another configuration: {'; '.join(listing[:4])}. "
            "Move it away, or call this command in another folder"
        )


class _ChildProcesses:
    """The running processes. A stop signal is passed on to all of them, and they are waited for."""

    def __init__(self, command: list[str], jobs: int) -> None:
        self.command = command
        self.jobs = jobs
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def __enter__(self) -> _ChildProcesses:
        self.previous_handlers = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if self.stopping.is_set():
            raise KeyboardInterrupt

    def train_and_score(self, run: PlannedRun, changes: Sequence[str], title: str) -> RunResult:
        """Train, then score, unless the run has its scores."""
        log = run.directory.with_name(f"{run.directory.name}.log")
        if is_done(run, config_of(run, changes)):
            print(f"{title}: has its scores", flush=True)
            return RunResult(run, 0, 0.0, log)

        train = ["train", str(run.config), *changes, *run.own_changes]
        score = ["eval", str(run.directory)]
        for split in run.splits:
            score += ["--split", split]
        score += ["--language-blind", "--pictures", "6"]

        start = time.monotonic()
        status = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as output:
            for arguments in (train, score):
                if status == 0 and not self.stopping.is_set():
                    print(f"{title}: {arguments[0]}", flush=True)
                    status = self._call([*self.command, *arguments], output)
        seconds = time.monotonic() - start

        if self.stopping.is_set():
            return RunResult(run, ExitStatus.STOPPED, seconds, log)
        outcome = "done"
        if status != 0:
            outcome = f"status {status}: {_error_in(log)}; all of it: {log}"
        print(f"{title}: {outcome}, {seconds:.0f} s", flush=True)
        return RunResult(run, status, seconds, log)

    def _call(self, command: list[str], output: object) -> int:
        # Runs at the same time share the cores.
        threads = {}
        if self.jobs > 1:
            threads["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))

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
            "stopping: the runs save what they have; repeat the same command to resume",
            file=sys.stderr,
            flush=True,
        )
        for process in tuple(self.running):
            os.killpg(process.pid, signal.SIGTERM)


def _error_in(log: Path) -> str:
    """Return the last error that a run printed, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]

    errors = []
    for line in lines:
        for prefix in ("coupalign: error: ", "coupalign: the run failed: "):
            if line.startswith(prefix):
                errors.append(line.removeprefix(prefix))
    return (errors or lines or ["it printed nothing"])[-1]


def submit(
    runs: Sequence[PlannedRun], changes: Sequence[str], options: str, folder: Path
) -> list[list[str]]:
    """Submit the runs that have no scores to Slurm, as one array per configuration.

    Args:
        options: for sbatch: nodes, GPUs, time.
        folder: where the lists of variants are kept.

    Returns:
        the commands that were called.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    (RUNS / "slurm").mkdir(parents=True, exist_ok=True)
    waiting = [run for run in dict.fromkeys(runs) if not is_done(run, config_of(run, changes))]

    commands = []
    for config in dict.fromkeys(run.config for run in waiting):
        same_config = [run for run in waiting if run.config == config]
        for run in same_config:
            refuse_other_configuration(run, changes)

        # One line per task: the variant, then its overrides.
        sweep = folder / f"{config.stem}.txt"
        with whole_file(sweep, "w") as file:
            for run in same_config:
                file.write(shlex.join([run.variant, *run.overrides, f"seed={run.seed}"]) + "\n")

        array = ["--array", f"0-{len(same_config) - 1}"]
        task = [str(SWEEP), str(sweep), str(config), *changes]
        command = ["sbatch", *array, *shlex.split(options), *task]
        splits = dict.fromkeys(split for run in same_config for split in run.splits)
        _sbatch(command, " ".join(splits))
        commands.append(command)
    return commands


def _sbatch(command: Sequence[str], splits: str) -> None:
    environment = {**os.environ, "COUPALIGN_SPLITS": splits}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise InputError(
            "--slurm: there is no sbatch here; call it on a login node of the cluster"
        ) from None

    if done.returncode:
        raise InputError(f"--slurm: sbatch refused: {done.stderr.strip()}\n{shlex.join(command)}")
    print(done.stdout.strip(), flush=True)
