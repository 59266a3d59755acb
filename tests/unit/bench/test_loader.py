"""`coupalign bench loader` on generated scenes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from coupalign.cli.parser import main

BASELINES = ("decode", "decode and resize", "decode and resize, Pillow", "file by file")
TINY = """
name: tiny
data: {{train: [{{index: {shards}, split: train}}], image_size: 32, max_tokens: 8, workers: 1}}
train: {{global_batch: 4, max_micro_batch: 2}}
"""


def test_every_method_is_timed_and_no_file_is_left(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out, scratch = tmp_path / "tiny.yaml", tmp_path / "loader.json", tmp_path / "scratch"
    config.write_text(TINY.format(shards=shards))
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    options = ["--steps", "3", "--warmup", "1", "--soak", "80", "--out", str(out)]

    assert main(["bench", "loader", str(config), *options]) == 0

    # Rates and ratios.
    table, result = capsys.readouterr().out, json.loads(out.read_text())
    rates = result["samples_per_second"]
    loaders = ["loader", "loader, 1 workers", "loader, cold files", "loader, HTTP, empty cache"]
    assert list(rates) == [*BASELINES, *loaders]
    assert all(0 < low <= median <= high for median, low, high in rates.values()), rates
    assert result["ratios"] == {
        f"loader / {name}": rates["loader"][0] / rates[name][0] for name in BASELINES
    }
    assert f"{rates['loader'][0]:,.1f}" in table
    assert "3 steps of 4" in table

    # Sizes and memory.
    gigabytes = result["gigabytes"]
    assert result["megapixels"] == pytest.approx(64 * 64 / 1e6)
    assert 0 < gigabytes["start"] <= 2 * gigabytes["end"]
    assert 0 < gigabytes["worker start"] <= 2 * gigabytes["worker end"]
    assert "of the largest worker" in table
    assert list(result["soak"]) == [str(samples) for samples in range(8, 81, 8)]
    assert all(result["soak"].values())
    assert "after 80 samples" in table

    # The fork server of the workers removes its own folders when this process ends.
    assert not [path for path in scratch.iterdir() if not path.name.startswith("pymp-")]


def test_configuration_without_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "empty.yaml"
    config.write_text("name: empty\n")

    assert main(["bench", "loader", str(config)]) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_soak_needs_workers(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(shards=shards))

    assert main(["bench", "loader", str(config), "data.workers=0", "--soak", "80"]) == 2
    assert "set data.workers to 1 or more" in capsys.readouterr().err
