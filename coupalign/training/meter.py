"""Where the time goes: throughput, waiting for data, saving, and which rank delays the others."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from coupalign.data.batch import Batch
from coupalign.distributed.world import World, gather_objects, gather_vector

RANKS = "ranks.jsonl"

# A rank is a straggler if its time per step is this many times the median, and this many seconds
# above it.
_STRAGGLER_RATIO = 1.5
_STRAGGLER_S = 0.05

logger = logging.getLogger("coupalign.training")


class Meter:
    """Measure a training session on one rank.

    Attributes:
        saves: checkpoints saved in this session.
        saving_s: seconds spent on them.
        last_save_s: seconds of the last one.
        last_wait_share: share of time spent waiting for data, as of the last `read`.
    """

    def __init__(self) -> None:
        self.last_wait_share = self.last_step_s = 0.0
        self.steps = 0
        self.session_began = time.perf_counter()
        self.saves, self.saving_s = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Begin to measure again, after what was measured has been logged."""
        self.last_step_s = self.step_seconds
        self.began = time.perf_counter()
        self.waited_s = self.forward_s = 0.0
        self.steps = self.samples = self.local_samples = self.cut_sentences = 0

    def add(self, samples: int, micro_batches: Sequence[Batch], forward_s: float) -> None:
        """Count a step.

        Args:
            samples: over all ranks.
            micro_batches: this rank's part of them.
            forward_s: seconds of this rank's forward passes.
        """
        self.steps += 1
        self.samples += samples
        self.forward_s += forward_s
        for batch in micro_batches:
            self.local_samples += len(batch)
            self.cut_sentences += sum(info.cut for info in batch.info)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what runs inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - began

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave out the time inside, such as that of an evaluation: it is not training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - began

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what runs inside as saving a checkpoint, and leave it out like `pausing`."""
        began = time.perf_counter()
        with self.pausing():
            yield
        self.last_save_s = time.perf_counter() - began
        self.saves += 1
        self.saving_s += self.last_save_s

    @property
    def saving_share(self) -> float:
        """The share of the session so far that went into saving."""
        return self.saving_s / (time.perf_counter() - self.session_began)

    @property
    def step_seconds(self) -> float:
        """Seconds per step since the last restart, or before it if no step was done since.

        0 before the first step.
        """
        if not self.steps:
            return self.last_step_s
        return (time.perf_counter() - self.began) / self.steps

    def local_seconds(self) -> tuple[float, float]:
        """Return seconds per step that do not depend on the other ranks.

        Returns:
            (seconds waiting for data, seconds in forward passes)
        """
        steps = max(1, self.steps)
        return self.waited_s / steps, self.forward_s / steps

    def read(self) -> dict[str, float]:
        """Return rates and shares since the last restart, as metrics for the log."""
        seconds = time.perf_counter() - self.began
        self.last_wait_share = self.waited_s / seconds
        return {
            "train/samples_per_second": self.samples / seconds,
            "data/wait_share": self.last_wait_share,
            "data/cut_sentences_share": self.cut_sentences / max(1, self.local_samples),
        }


class RankTimes:
    """Compare the ranks: append their times to <run>/ranks.jsonl, warn once of each straggler.

        {"step": 120, "data_s": [0.01, 0.01, 0.62, 0.01], "forward_s": [0.21, 0.20, 0.21, 0.21]}

    These are each rank's seconds per step outside of collectives: waiting for data, and in forward
    passes. The wall time of a step would not tell them apart, since every rank waits for the
    slowest. Under ZeRO 3, a forward pass waits for the others, too.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path, self.world = run_dir / RANKS, world
        self.hosts = gather_objects(socket.gethostname(), world)
        self.warned_of: set[int] = set()

    def compare(self, step: int, local_seconds: tuple[float, float]) -> dict[str, float]:
        """Compare the ranks after `step`; collective.

        Returns:
            metrics of the slowest rank; empty with one rank.
        """
        if self.world.size == 1:
            return {}

        own = torch.tensor(local_seconds, dtype=torch.float64, device=self.world.device)
        seconds = gather_vector(own, self.world)  # [ranks, 2]
        total = seconds.sum(1)
        slowest, median = int(total.argmax()), float(total.median())

        if self.world.is_main:
            self._append(step, seconds)
            self._warn_of_straggler(slowest, seconds[slowest], median)
        return {
            "ranks/slowest": float(slowest),
            "ranks/slowest_s": float(total[slowest]),
            "ranks/median_s": median,
        }

    def _append(self, step: int, seconds: torch.Tensor) -> None:
        data_s, forward_s = seconds.T.tolist()
        line = {
            "step": step,
            "data_s": [round(value, 4) for value in data_s],
            "forward_s": [round(value, 4) for value in forward_s],
        }
        # The journal reports a full disk. A link in somebody else's run directory is not followed.
        with suppress(OSError), open(self.path, "a", opener=_open_no_link) as file:
            file.write(json.dumps(line) + "\n")

    def _warn_of_straggler(self, rank: int, seconds: torch.Tensor, median: float) -> None:
        data_s, forward_s = seconds.tolist()
        threshold = max(_STRAGGLER_RATIO * median, median + _STRAGGLER_S)
        if rank in self.warned_of or data_s + forward_s < threshold:
            return
        self.warned_of.add(rank)
        logger.warning(
            "rank %d on %s holds up the others: it takes %.2f s per step by itself (%.2f s waiting "
            "for data, %.2f s forward), while the median of the ranks is %.2f s; %s has all times",
            rank,
            self.hosts[rank],
            data_s + forward_s,
            data_s,
            forward_s,
            median,
            self.path,
        )


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
