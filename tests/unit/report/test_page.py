"""The page of a run: complete, safe from what it quotes, and independent of other files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from coupalign.errors import InputError, RunError
from coupalign.files import write_json
from coupalign.report import report_run
from tests.unit.report.examples import EVIL, SENTENCES, score_of, write_run
from tests.unit.report.page_parser import Page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo & <i>more")


def test_page_is_complete_and_needs_no_other_file(run: Path):
    path = report_run(run)

    page = Page(path)
    assert path == run / "report.html"
    assert not page.open
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert page.tags.count("svg") == 2
    assert page.tags.count("figure") > 4

    source = path.read_text()
    assert "url(" not in source
    assert "://" not in source


def test_page_shows_every_section(run: Path):
    text = Page(report_run(run)).text

    for expected in (
        "demo & <i>more",
        "73.50",
        "13.50",
        "language-blind",
        "ris-v1",
        "lavt",
        "p > 0.5 <b>",
        "cdcd",
        "not checked",
        "8 (image, sentence) samples",
        "Training loss by step",
        "Score on val",
        EVIL,
        "Best",
        "Worst",
        "Median",
        "Random",
        "refshapes/none/0/1",
        "name: demo",
        "Scores by group: val",
        "Size of the object",
        "Other objects of its class",
        "few",
        "What the model looked at",
    ):
        assert expected in text, expected
    assert sum(text.count(sentence) for sentence in SENTENCES) >= 5
    assert "</script><b>you" in text


def test_same_run_gives_same_bytes(run: Path):
    first = report_run(run).read_bytes()

    assert report_run(run).read_bytes() == first


def test_run_with_nothing_but_a_score(tmp_path: Path):
    write_json(tmp_path / "score.json", {"split": "testA", **score_of(blind=False).to_json()})

    page = Page(report_run(tmp_path))

    assert "Score: testA" in page.text
    assert "Scores by group" not in page.text
    assert not {"svg", "img", "form"} & set(page.tags)


def test_damaged_rows_are_named(run: Path):
    (run / "scores" / "val-ris-v1.csv").write_text("sample_id,intersection,union,iou\na,1,2,0.5\n")

    with pytest.raises(InputError, match=r"val-ris-v1\.csv.*coupalign eval"):
        report_run(run)
    assert not (run / "report.html").exists()


def test_links_of_a_foreign_run_do_not_bring_files_of_this_machine(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (tmp_path / "secret.txt").write_text("password")
    (run / "config.yaml").unlink(missing_ok=True)
    (run / "config.yaml").symlink_to(tmp_path / "secret.txt")

    with pytest.raises(InputError, match=r"config\.yaml: is a link to a file outside of the run"):
        report_run(run)

    (run / "config.yaml").unlink()
    (run / "pictures" / "other").symlink_to(run / "pictures" / "val")
    with pytest.raises(InputError, match="other: is a link"):
        report_run(run)


def test_half_written_pictures_are_not_shown(tmp_path: Path):
    run = write_run(tmp_path / "run")
    (run / "pictures" / ".testA.5-host.partial").mkdir()
    (run / "pictures" / ".testA.5-host.partial" / "pictures.json").write_text("[")

    assert "testA" not in report_run(run).read_text()


def test_page_replaces_nothing_but_a_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    page.touch()
    for _ in range(2):
        assert report_run(run, page) == page

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    (tmp_path / "gone").symlink_to("nowhere")
    for other in (run / "config.yaml", *map(tmp_path.joinpath, ("pipe", "link", "gone"))):
        before = other.lstat()
        with pytest.raises(InputError, match=f"{other.name}: is there, .* name another file"):
            report_run(run, other)
        assert other.lstat() == before


def test_full_disk_while_the_page_is_written_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)

    with pytest.raises(RunError, match=r"report\.html: the page could not be written"):
        report_run(run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".*"))
