"""What training measures of its own speed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from coupalign.distributed.world import World
from coupalign.training import meter
from coupalign.training.meter import RANKS, Meter, RankTimes


class Clock:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_meter_counts_samples_waiting_and_forward_passes(clock: Clock) -> None:
    measured = Meter()
    for _ in range(2):
        with measured.waiting():
            clock.now += 1.0
        clock.now += 3.0
        measured.add(16, [], forward_s=0.5)

    rates = measured.read()

    assert rates["train/samples_per_second"] == 4.0
    assert rates["data/wait_share"] == measured.last_wait_share == 0.25
    assert measured.local_seconds() == (1.0, 0.5)
    assert measured.step_seconds == 4.0


def test_meter_leaves_out_saving_and_evaluating(clock: Clock) -> None:
    measured = Meter()
    for _ in range(2):
        clock.now += 2.0
        measured.add(16, [], forward_s=0.0)
        with measured.saving():
            clock.now += 6.0
        with measured.pausing():
            clock.now += 24.0

    assert (measured.saves, measured.saving_s, measured.last_save_s) == (2, 12.0, 6.0)
    assert measured.saving_share == 12 / 64
    assert measured.step_seconds == 2.0
    assert measured.read()["train/samples_per_second"] == 8.0


def test_meter_remembers_the_step_time_from_before_a_restart(clock: Clock) -> None:
    measured = Meter()
    assert measured.step_seconds == 0.0
    clock.now += 2.0
    measured.add(16, [], forward_s=0.0)

    measured.restart()
    clock.now += 100.0

    assert measured.steps == 0 and measured.step_seconds == 2.0


def test_rank_times_writes_all_and_warns_of_a_straggler_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = torch.tensor([[0.1, 0.2], [0.9, 0.2], [0.1, 0.2]], dtype=torch.float64)
    monkeypatch.setattr(meter, "gather_objects", lambda value, world: ["n0", "n1", "n2"])
    monkeypatch.setattr(meter, "gather_vector", lambda values, world: seconds)
    times = RankTimes(tmp_path, World(0, 3, 0, 3, torch.device("cpu")))

    with caplog.at_level(logging.WARNING, "coupalign.training"):
        metrics = [times.compare(step, (0.1, 0.2)) for step in (10, 20)]

    assert metrics[0] == metrics[1]
    assert metrics[0] == pytest.approx(
        {"ranks/slowest": 1.0, "ranks/slowest_s": 1.1, "ranks/median_s": 0.3}
    )
    [warning] = caplog.messages
    assert warning.startswith("rank 1 on n1 holds up the others")
    lines = [json.loads(line) for line in (tmp_path / RANKS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["data_s"] == [0.1, 0.9, 0.1] and lines[0]["forward_s"] == [0.2, 0.2, 0.2]


def test_rank_times_do_not_follow_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's run directory may link to a file of the user's."""
    other = tmp_path / "other.txt"
    other.write_text("precious")
    (tmp_path / RANKS).symlink_to(other)
    seconds = torch.zeros(2, 2, dtype=torch.float64)
    monkeypatch.setattr(meter, "gather_objects", lambda value, world: ["n0", "n1"])
    monkeypatch.setattr(meter, "gather_vector", lambda values, world: seconds)

    metrics = RankTimes(tmp_path, World(0, 2, 0, 2, torch.device("cpu"))).compare(10, (0.0, 0.0))

    assert metrics["ranks/median_s"] == 0
    assert other.read_text() == "precious"


def test_rank_times_of_a_single_rank_are_not_compared(tmp_path: Path) -> None:
    times = RankTimes(tmp_path, World(0, 1, 0, 1, torch.device("cpu")))

    assert times.compare(10, (0.1, 0.2)) == {}
    assert not (tmp_path / RANKS).exists()
