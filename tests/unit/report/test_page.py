"""The page of a run: it holds what it should, trusts nothing that it quotes, and needs no other file."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coupalign.errors import InputError
from coupalign.files import write_json
from coupalign.report import report_run
from coupalign.report.pictures import save_pictures
from coupalign.report.scores import name_scores, read_scores
from tests.unit.report.examples import EVIL, SENTENCES, evaluation_of, score_of, write_run


class Page(HTMLParser):
    """Tags that were opened and not closed, all tags, all addresses, and the text outside of script and style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action")
        ]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["script"], ["style"]) else ""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo & <i>more")


def test_the_page_is_whole_and_needs_nothing_else(run: Path):
    path = report_run(run)
    page = Page(path)
    assert path == run / "report.html" and not page.open
    assert page.tags.count("script") == 1 and not {"link", "iframe", "object"} & set(page.tags)
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert page.tags.count("svg") == 2 and page.tags.count("figure") > 4
    assert "url(" not in path.read_text() and "://" not in path.read_text()


def test_the_page_says_what_it_should(run: Path):
    text = Page(report_run(run)).text
    for words in (
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
        assert words in text, words
    assert sum(text.count(sentence) for sentence in SENTENCES) >= 5 and "</script><b>you" in text


def test_a_picture_in_two_groups_is_shown_once_without_its_heading(run: Path, tmp_path: Path):
    page = Page(report_run(run))
    listed = json.loads((run / "pictures" / "val" / "pictures.json").read_text())
    assert page.tags.count("figure") == len({entry["name"] for entry in listed}) < len(listed)
    assert (
        page.tags.count("img") == page.tags.count("figure") + page.tags.count("details") - 1
    )  # one is the configuration's


def test_the_same_run_gives_the_same_bytes(run: Path):
    first = report_run(run).read_bytes()
    assert report_run(run).read_bytes() == first


def test_a_later_scoring_stands_for_that_of_training(run: Path):
    scores = read_scores(run)
    assert list(scores) == [("val", "ris-v1", "each"), ("val", "lavt", "first")]
    assert list(name_scores(scores).values()) == ["val", "val (lavt, first)"]
    assert scores["val", "ris-v1", "each"].language_blind is not None


def test_what_training_took_before_an_upgrade_is_no_obstacle_once_it_is_scored_again(run: Path):
    old = json.loads((run / "scores" / "val.json").read_text())
    del old["bIoU"]
    write_json(run / "scores" / "val.json", old)
    assert len(read_scores(run)) == 2
    (run / "scores" / "val-ris-v1.json").unlink()
    (run / "scores" / "val-lavt-first.json").unlink()
    with pytest.raises(InputError, match=r"val\.json.*bIoU.*coupalign eval"):
        read_scores(run)


def test_a_run_with_nothing_but_a_score(tmp_path: Path):
    (tmp_path / "score.json").write_text(
        json.dumps({"split": "testA", **score_of(blind=False).to_json()})
    )
    page = Page(report_run(tmp_path))
    assert (
        "Score: testA" in page.text
        and "Scores by group" not in page.text
        and not {"svg", "img", "form"} & set(page.tags)
    )


def test_large_pictures_are_reduced(tmp_path: Path):
    (tmp_path / "score.json").write_text(json.dumps(score_of().to_json()))
    save_pictures(tmp_path / "pictures" / "val", evaluation_of(2, (700, 900)), 1)
    page = Page(report_run(tmp_path))
    assert all(address.startswith("data:image/jpeg") for address in page.addresses)
    assert (tmp_path / "report.html").stat().st_size < 2 * 900_000


@pytest.mark.parametrize("text", ["{", "[]", '{"protocol": "ris-v1"}'])
def test_a_damaged_score_is_named(tmp_path: Path, text: str):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "val.json").write_text(text)
    with pytest.raises(InputError, match=r"val\.json"):
        report_run(tmp_path)


def test_damaged_rows_are_named(run: Path):
    (run / "scores" / "val-ris-v1.csv").write_text("sample_id,intersection,union,iou\na,1,2,0.5\n")
    with pytest.raises(InputError, match=r"val-ris-v1\.csv.*coupalign eval"):
        report_run(run)
    assert not (run / "report.html").exists()


def test_a_run_without_scores_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match="coupalign eval"):
        report_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_pictures_of_an_older_version_are_shown(run: Path):
    path = run / "pictures" / "val" / "pictures.json"
    old = ("group", "file", "name", "sentence", "iou")
    write_json(path, [{key: entry[key] for key in old} for entry in json.loads(path.read_text())])
    page = Page(report_run(run))
    assert (
        "IoU" in page.text and "boundary IoU 0" not in page.text and page.tags.count("figure") > 4
    )
