"""`coupalign verify` on addresses: the command line keeps them as they are, and shows no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from coupalign.data import shards
from tests.unit.data.photographs import Stored, coco_name, encode, pack_photographs, photograph


def test_verify_of_an_address_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "https://me:s3cret@host/shards"]) == 2

    message = capsys.readouterr().err
    assert "https://***@host/shards: verify reads every byte" in message and "--leaks" in message


def test_leaks_of_addresses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Stored(9, coco_name(9), encode(photograph(9)))
    pack_photographs(tmp_path / "one", "refcoco", [photo])
    copy = Stored(77, "mine.jpg", encode(photograph(9), 60), "val")
    pack_photographs(tmp_path / "two", "mine", [copy])
    fetched = []

    def fetch(url: str, limit: int) -> bytes:
        fetched.append(url)
        return (tmp_path / "two" / "shards" / "index.json").read_bytes()

    monkeypatch.setattr(shards, "fetch", fetch)

    status = main(["verify", "--leaks", str(tmp_path / "one/shards"), "s3://sets/two", "--json"])

    assert status == 0 and fetched == ["s3://sets/two/index.json"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["shared"] == [
        ["mine/unc val", "refcoco/unc train", 1],
        ["refcoco/unc train", "mine/unc val", 1],
    ]
    assert found["unknown"] == {}
