"""The journal: every number once, through kills, resumes and full disks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO

import pytest

from coupalign.errors import RunError
from coupalign.tracking import JOURNAL, read_journal
from coupalign.tracking.journal import Journal


def points(run_dir: Path) -> list[tuple[int, str, float]]:
    """Every number of a journal as (step, name, value), in the order of the file."""
    return [
        (measurement.step, name, value)
        for measurement, _ in read_journal(run_dir / JOURNAL)
        for name, value in measurement.metrics.items()
    ]


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """The numbers of one name as (step, value), in the order of the file."""
    return [(step, value) for step, other, value in points(run_dir) if other == name]


def test_journal_that_cannot_be_opened_is_a_failed_run(tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__) -> IO[bytes]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("coupalign.tracking.journal.open", fail, raising=False)

    with pytest.raises(RunError, match=r"metrics\.jsonl: .*Input/output error.*run the same"):
        Journal(tmp_path)


def test_log_writes_its_row_to_disk_before_it_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    journal.log(3, {"loss": 0.5})

    row = json.loads((tmp_path / JOURNAL).read_text())
    assert row["step"] == 3
    assert row["metrics"] == {"loss": 0.5}
    assert isinstance(row["time"], float)
    journal.close()


def test_nan_and_infinity_survive_as_strict_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    journal.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((tmp_path / JOURNAL).read_text(), parse_constant=refuse)
    (_, _, a), (_, _, b), (_, _, c) = points(tmp_path)
    assert math.isnan(a)
    assert b == math.inf
    assert c == -math.inf


@pytest.mark.parametrize("cut", [1, 7, 30, 45])
def test_resume_after_a_kill_repeats_and_loses_no_step(tmp_path: Path, cut: int) -> None:
    # A session whose last line was cut off.
    journal = Journal(tmp_path)
    for step in range(1, 8):
        journal.log(step, {"loss": float(step)})
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[:-cut])

    # The next session repeats steps 5 to 7.
    resumed = Journal(tmp_path)
    for step in range(5, 12):
        resumed.log(step, {"loss": float(step)})
        resumed.log(step, {"loss": -1.0, "score": float(step)})
    resumed.close()

    assert sorted(curve(tmp_path, "loss")) == [(step, float(step)) for step in range(1, 12)]
    assert curve(tmp_path, "score") == [(step, float(step)) for step in range(5, 12)]
    assert (tmp_path / JOURNAL).read_bytes().endswith(b"\n")


def test_damaged_lines_in_the_middle_are_skipped_and_offsets_stay_right(tmp_path: Path) -> None:
    # One good row, damaged and impossible lines, one good row.
    journal = Journal(tmp_path)
    journal.log(1, {"loss": 1.0})
    journal.close()
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(b'\x00\x00\x00\n{"step": 2}\n[]\n' + b"[" * 100_000 + b"\n")
        for step, seconds in (("1e999", "1"), ("1" + "0" * 30, "1"), ("2", "NaN"), ("2", "1e300")):
            line = f'{{"step": {step}, "time": {seconds}, "metrics": {{"loss": 1}}}}\n'
            file.write(line.encode())
    journal = Journal(tmp_path)
    journal.log(3, {"loss": 3.0})
    journal.close()

    rows = list(read_journal(tmp_path / JOURNAL))

    assert [measurement.step for measurement, _ in rows] == [1, 3]
    (_, end_of_first), (_, end_of_last) = rows
    assert end_of_last == (tmp_path / JOURNAL).stat().st_size
    after_first = read_journal(tmp_path / JOURNAL, end_of_first)
    assert [measurement.step for measurement, _ in after_first] == [3]


class FullDisk:
    """A raw file that takes `free` bytes and then has no space until more is given."""

    def __init__(self, file: IO[bytes], free: int) -> None:
        self.file = file
        self.free = free
        self.closed = False

    def write(self, content: bytes) -> int:
        if self.free == 0:
            raise OSError(28, "No space left on device")
        written = self.file.write(content[: self.free])
        self.free -= written
        return written


def test_full_disk_is_reported_once_and_loses_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    disk = FullDisk(journal._file, free=100)
    journal._file = disk

    # The disk has space for one row.
    for step in range(5):
        journal.log(step, {"loss": float(step)})
    assert [step for step, _, _ in points(tmp_path)] == [0]
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text

    # Space is freed.
    disk.free = 10**6
    journal.log(5, {"loss": 5.0})
    journal._file = disk.file
    journal.close()
    assert [step for step, _, _ in points(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert len(caplog.records) == 2
    assert "written again" in caplog.text
