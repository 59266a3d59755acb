"""`coupalign bench loader` on generated scenes: every way delivers, the ratios are those of the table, and nothing is left behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from coupalign.bench.loader import LoaderBench
from coupalign.cli.parser import main

ONE_CORE = ("decode", "decode and resize", "decode and resize, Pillow", "file by file", "loader")
TINY = """
name: tiny
data: {{train: [{{index: {shards}, split: train}}], image_size: 32, max_tokens: 8, workers: 1}}
train: {{global_batch: 4, max_micro_batch: 2}}
"""


def test_every_way_delivers(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, scratch = tmp_path / "tiny.yaml", tmp_path / "scratch"
    scratch.mkdir()
    config.write_text(TINY.format(shards=shards))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    words = [
        "bench",
        "loader",
        str(config),
        "--steps",
        "3",
        "--warmup",
        "1",
        "--soak",
        "80",
        "--out",
        str(tmp_path / "loader.json"),
    ]
    assert main(words) == 0
    table, value = capsys.readouterr().out, json.loads((tmp_path / "loader.json").read_text())
    rates = value["samples_per_second"]
    assert list(rates) == [
        *ONE_CORE,
        "loader, 1 workers",
        "loader, cold files",
        "loader, HTTP, empty cache",
    ]
    assert all(0 < low <= middle <= high for middle, low, high in rates.values()), rates
    assert value["ratios"] == {
        f"loader / {name}": rates["loader"][0] / rates[name][0] for name in ONE_CORE[:-1]
    }
    assert f"{rates['loader'][0]:,.1f}" in table and "3 steps of 4" in table
    assert (
        value["megapixels"] == pytest.approx(64 * 64 / 1e6)
        and 0 < value["gigabytes"]["start"] <= 2 * value["gigabytes"]["end"]
    )
    assert (
        0 < value["gigabytes"]["worker start"] <= 2 * value["gigabytes"]["worker end"]
        and "of the largest worker" in table
    )
    assert list(value["soak"]) == [str(samples) for samples in range(8, 81, 8)]
    assert all(value["soak"].values()) and "of it after 80" in table
    # what the server of the worker processes has there goes with this process
    assert not [path for path in scratch.iterdir() if not path.name.startswith("pymp-")]


def test_a_configuration_without_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "empty.yaml"
    config.write_text("name: empty\n")
    assert main(["bench", "loader", str(config)]) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_an_earlier_result_without_a_soak_is_read() -> None:
    value = LoaderBench(
        {"device": "x"},
        "tiny",
        32,
        4,
        3,
        {"loader": (2.0, 1.0, 3.0)},
        {},
        1,
        1,
        {"start": 1, "end": 1},
    ).to_json()
    del value["soak"]
    assert LoaderBench.from_json(value).figures() == {"samples/s loader": 2.0}


def test_a_soak_needs_workers(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(shards=shards))
    assert main(["bench", "loader", str(config), "data.workers=0", "--soak", "80"]) == 2
    assert "set data.workers to 1 or more" in capsys.readouterr().err
