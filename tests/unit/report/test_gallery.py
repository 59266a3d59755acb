"""The pictures of a page: one card per sample, embedded and reduced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.files import write_json
from coupalign.report import report_run
from coupalign.report.gallery import picture_section
from coupalign.report.pictures import save_pictures
from tests.unit.report.examples import evaluation_of, score_of, write_run
from tests.unit.report.page_parser import Page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


def test_picture_in_two_groups_is_shown_once_without_its_heading(run: Path):
    page = Page(report_run(run))

    listed = json.loads((run / "pictures" / "val" / "pictures.json").read_text())
    figures = page.tags.count("figure")
    assert figures == len({entry["name"] for entry in listed}) < len(listed)
    # One of the details is the configuration's, the others hold an explanation.
    assert page.tags.count("img") == figures + page.tags.count("details") - 1


def test_large_pictures_are_reduced(tmp_path: Path):
    write_json(tmp_path / "score.json", score_of().to_json())
    save_pictures(tmp_path / "pictures" / "val", evaluation_of(2, (700, 900)), 1)

    path = report_run(tmp_path)

    addresses = Page(path).addresses
    assert all(address.startswith("data:image/jpeg") for address in addresses)
    assert path.stat().st_size < 2 * 900_000


def test_pictures_of_older_version_are_shown(run: Path):
    path = run / "pictures" / "val" / "pictures.json"
    old_keys = ("group", "file", "name", "sentence", "iou")
    entries = json.loads(path.read_text())
    write_json(path, [{key: entry[key] for key in old_keys} for entry in entries])

    page = Page(report_run(run))

    assert "IoU" in page.text
    assert "boundary IoU 0" not in page.text
    assert page.tags.count("figure") > 4


def test_folder_without_pictures_has_no_section(tmp_path: Path):
    assert picture_section("val", tmp_path) == ""
