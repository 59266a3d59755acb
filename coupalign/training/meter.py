"""Where the time goes: samples per second, waiting for data, saving, and which rank the others wait for."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from coupalign.data.batch import Batch
from coupalign.distributed.world import World, gather_objects, gather_vector

RANKS = "ranks.jsonl"
_SLOW, _SLOW_S = (
    1.5,
    0.05,
)  # a rank is a straggler from this many times the median on, and this many seconds a step above it

logger = logging.getLogger("coupalign.training")


class Meter:
    """Times of a session on one rank."""

    def __init__(self) -> None:
        self.last_wait = self.last_step_s = 0.0
        self.steps = 0
        self.session_began = time.perf_counter()
        self.saves, self.saving_s = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Forget the time until now: an evaluation or a checkpoint is not training."""
        self.last_step_s = self.step_seconds
        self.began = time.perf_counter()
        self.waited = self.forward_s = 0.0
        self.steps = self.samples = self.read_here = self.cut_here = 0

    def add(self, samples: int, micro_batches: Sequence[Batch], forward_s: float) -> None:
        """Count a step of `samples` over all ranks, whose part on this rank are the micro-batches."""
        self.steps += 1
        self.samples += samples
        self.forward_s += forward_s
        self.read_here += sum(len(batch) for batch in micro_batches)
        self.cut_here += sum(info.cut for batch in micro_batches for info in batch.info)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside is waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What runs inside is saving."""
        began = time.perf_counter()
        yield
        self.saves, self.saving_s = self.saves + 1, self.saving_s + time.perf_counter() - began
        self.last_save_s = time.perf_counter() - began
        self.restart()

    @property
    def saving_share(self) -> float:
        """The share of the session until now that went into saving."""
        return self.saving_s / (time.perf_counter() - self.session_began)

    @property
    def step_seconds(self) -> float:
        """Seconds a step since the last look, or before it where nothing was done since; 0 before the first step."""
        return (time.perf_counter() - self.began) / self.steps if self.steps else self.last_step_s

    def own_seconds(self) -> tuple[float, float]:
        """Seconds a step that this rank waited for data and spent in forward passes: what it does without the other ranks."""
        return self.waited / max(1, self.steps), self.forward_s / max(1, self.steps)

    def read(self) -> dict[str, float]:
        """Rates and shares since the last look, for the log; `restart` begins the next one."""
        passed = time.perf_counter() - self.began
        self.last_wait = self.waited / passed
        return {
            "train/samples_per_second": self.samples / passed,
            "data/wait_share": self.last_wait,
            "data/cut_sentences_share": self.cut_here / max(1, self.read_here),
        }


class RankTimes:
    """Compares the ranks: a line of seconds by rank in <run>/ranks.jsonl, and a warning that names a straggler, once.

        {"step": 120, "data_s": [0.01, 0.01, 0.62, 0.01], "forward_s": [0.21, 0.20, 0.21, 0.21]}

    Each rank's seconds a step outside of collectives: waiting for data, and in forward passes. The wall time of a step tells
    nothing, since every rank waits for the slowest. Under ZeRO 3 a forward pass waits for others, too.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path, self.world = run_dir / RANKS, world
        self.hosts = gather_objects(socket.gethostname(), world)
        self.named: set[int] = set()

    def note(self, step: int, own_seconds: tuple[float, float]) -> dict[str, float]:
        """Compare after `step`; collective. Metrics of the slowest rank; none where there is one rank."""
        if self.world.size == 1:
            return {}
        seconds = gather_vector(
            torch.tensor(own_seconds, dtype=torch.float64, device=self.world.device), self.world
        )  # [ranks, 2]
        total = seconds.sum(1)
        slowest, median = int(total.argmax()), float(total.median())
        if self.world.is_main:
            line = {
                "step": step,
                "data_s": _rounded(seconds[:, 0]),
                "forward_s": _rounded(seconds[:, 1]),
            }
            with (
                suppress(OSError),
                open(self.path, "a", encoding="utf-8") as file,
            ):  # a full disk is the journal's to report
                file.write(json.dumps(line) + "\n")
            self._name(slowest, seconds, median)
        return {
            "ranks/slowest": float(slowest),
            "ranks/slowest_s": float(total[slowest]),
            "ranks/median_s": median,
        }

    def _name(self, rank: int, seconds: torch.Tensor, median: float) -> None:
        data, forward = seconds[rank].tolist()
        if rank in self.named or data + forward < max(_SLOW * median, median + _SLOW_S):
            return
        self.named.add(rank)
        logger.warning(
            "rank %d on %s holds up the others: %.2f s a step by itself (%.2f s waiting for data, %.2f s forward), the median "
            "of the ranks is %.2f s; %s has the times of all",
            rank,
            self.hosts[rank],
            data + forward,
            data,
            forward,
            median,
            self.path,
        )


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
