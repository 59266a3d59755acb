"""The page of a run: it holds what it should, trusts nothing that it quotes, and needs no other file."""
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from coupalign.errors import InputError
from coupalign.evaluation.evaluator import Evaluation
from coupalign.evaluation.metrics import Score, summarize
from coupalign.evaluation.pictures import Picture, keep_pictures, read_pictures
from coupalign.report import line_chart, read_curves, read_scores, report_run

EVIL = '<script>alert("1 & 2")</script> \'red\' {body} star'


def score_of(protocol: str = "ris-v1", inside: int = 70, blind: bool = True) -> Score:
    rows = np.asarray([[number, inside + number, 100] for number in range(8)], dtype=np.int64)
    values = summarize(rows, bootstrap=20)
    samples, images, intervals = values.pop("samples"), values.pop("images"), values.pop("intervals")
    conditions = {"threshold": "p > 0.5 <b>", "truth": "original resolution"}
    other = score_of(protocol, 10, False) if blind else None
    return Score(protocol, values, samples, images, intervals, conditions, "cd" * 32, language_blind=other)


def pictures_of(many: int = 6, size: tuple[int, int] = (20, 30), sentence: str = EVIL) -> Evaluation:
    random = np.random.default_rng(0)
    pictures, rows = [], []
    for number in range(many):
        truth, prediction = (random.random(size) > 0.5 for _ in range(2))
        inside, union = int((truth & prediction).sum()), int((truth | prediction).sum())
        rows.append((number, inside, union))
        image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        pictures.append(Picture(number, f"refshapes/none/{number}/1", sentence, inside / union, image, truth, prediction))
    return Evaluation(None, np.asarray(rows, dtype=np.int64), tuple(pictures))


def write_metrics(path: Path, steps: int = 300) -> None:
    lines = []
    for step in range(10, steps + 1, 10):
        metrics = {"train/loss": 3 / step ** 0.3, "train/mask": 2 / step ** 0.3, "train/lr": 1e-4}
        if step % 100 == 0:
            metrics |= {"eval/val/oIoU": step / 500, "eval/val/P@0.5": step / 400}
        lines.append(json.dumps({"step": step, "time": 1.0 + step, "metrics": metrics}) + "\n")
    path.write_text("".join(lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run directory, with hostile words wherever a page quotes something."""
    folder = tmp_path / "demo & <i>more"
    (folder / "scores").mkdir(parents=True)
    (folder / "scores" / "val.json").write_text(json.dumps({"step": 300, **score_of(inside=60, blind=False).to_json()}))
    (folder / "scores" / "val-ris-v1.json").write_text(json.dumps({"checkpoint": "step-00000300", **score_of().to_json()}))
    (folder / "scores" / "val-lavt.json").write_text(json.dumps(score_of("lavt", blind=False).to_json()))
    write_metrics(folder / "metrics.jsonl")
    keep_pictures(folder / "pictures" / "val", pictures_of(), 2)
    (folder / "config.yaml").write_text(f"name: demo # {EVIL}\n")
    return folder


class Page(HTMLParser):
    """Tags that were opened and not closed, all tags, all addresses, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(run: Path):
    path = report_run(run)
    page = Page(path)
    assert path == run / "report.html" and not page.open
    assert not {"script", "link", "iframe", "i", "b>"} & set(page.tags)
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert page.tags.count("img") == 8 and page.tags.count("svg") == 2
    assert "url(" not in path.read_text() and "http" not in path.read_text()


def test_the_page_says_what_it_should(run: Path):
    text = Page(report_run(run)).text
    for words in ("demo & <i>more", "73.50", "13.50", "language-blind", "ris-v1", "lavt", "p > 0.5 <b>", "cdcd",
                  "not checked", "8 (image, sentence) samples", "Training loss by step", "Score on val", EVIL, "Best", "Worst",
                  "Around the median", "Drawn at random", "refshapes/none/0/1", "name: demo"):
        assert words in text, words
    assert text.count(EVIL) == 8 + 1


def test_the_same_run_gives_the_same_bytes(run: Path):
    first = report_run(run).read_bytes()
    assert report_run(run).read_bytes() == first


def test_a_later_scoring_stands_for_that_of_training(run: Path):
    scores = read_scores(run)
    assert list(scores) == ["val", "val (lavt)"]
    assert scores["val"].language_blind is not None


def test_a_run_with_nothing_but_a_score(tmp_path: Path):
    (tmp_path / "score.json").write_text(json.dumps({"split": "testA", **score_of(blind=False).to_json()}))
    page = Page(report_run(tmp_path))
    assert "Score: testA" in page.text and "svg" not in page.tags and "img" not in page.tags


def test_large_pictures_are_reduced(tmp_path: Path):
    (tmp_path / "score.json").write_text(json.dumps(score_of().to_json()))
    keep_pictures(tmp_path / "pictures" / "val", pictures_of(2, (700, 900), "large"), 1)
    page = Page(report_run(tmp_path))
    assert all(address.startswith("data:image/jpeg") for address in page.addresses)
    assert (tmp_path / "report.html").stat().st_size < 4 * 700_000


@pytest.mark.parametrize("text", ["{", "[]", '{"protocol": "ris-v1"}'])
def test_a_damaged_score_is_named(tmp_path: Path, text: str):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "val.json").write_text(text)
    with pytest.raises(InputError, match=r"val\.json"):
        report_run(tmp_path)


def test_a_run_without_scores_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match="coupalign eval"):
        report_run(tmp_path)
    assert not (tmp_path / "report.html").exists()


# -------------------------------------------------------------------------------------------------------- pictures


def test_pictures_come_back(tmp_path: Path):
    files = keep_pictures(tmp_path / "val", pictures_of(), 2)
    groups = read_pictures(tmp_path / "val")
    assert {group: len(entries) for group, entries in groups.items()} == {"random": 2, "best": 2, "median": 2, "worst": 2}
    assert len(files) == 8 and all(file.is_file() for file in files)
    assert [entry["iou"] for entry in groups["best"]] == sorted((e["iou"] for e in groups["best"]), reverse=True)
    keep_pictures(tmp_path / "val", pictures_of(2), 1)
    assert len(list((tmp_path / "val").iterdir())) == 4 + 1
    assert read_pictures(tmp_path / "none") == {}


def test_damaged_pictures_are_named(tmp_path: Path):
    files = keep_pictures(tmp_path / "val", pictures_of(), 1)
    files[0].unlink()
    with pytest.raises(InputError, match=files[0].name):
        read_pictures(tmp_path / "val")
    (tmp_path / "val" / "pictures.json").write_text("[{}]")
    with pytest.raises(InputError, match=r"pictures\.json"):
        read_pictures(tmp_path / "val")


# ---------------------------------------------------------------------------------------------------------- curves


def test_curves_survive_torn_lines_and_numbers_that_are_none(tmp_path: Path):
    journal = tmp_path / "metrics.jsonl"
    rows = [{"step": 20, "time": 0, "metrics": {"a": 2, "b": "NaN"}}, {"step": 10, "time": 0, "metrics": {"a": 1}}]
    journal.write_text("\n".join(map(json.dumps, rows)) + '\nbroken\n{"step": 30, "time": 0, "metrics": {"a"')
    assert read_curves(journal) == {"a": [(10, 1.0), (20, 2.0)]}
    assert read_curves(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize("values", [
    [0.5], [0.0, 0.0], [3, 2, 1], [-1, 5], [1e-9, 2e-9], [1e6, 3e7], np.linspace(1, 0, 5000).tolist()])
def test_a_chart_is_svg_within_its_borders(values: list[float]):
    chart = line_chart({"a < b": list(enumerate(values)), "empty": []}, "loss & more", marks=len(values) < 100)
    root = ElementTree.fromstring(chart)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    corners = re.findall(r"([-\d.]+),([-\d.]+)", root.find("polyline").attrib["points"])
    assert 1 <= len(corners) <= 200
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in corners)
    for label in root.findall("text"):
        assert 0 <= float(label.attrib["x"]) < width and 0 < float(label.attrib["y"]) <= height
    assert "nan" not in chart and "inf" not in chart


def test_a_falling_curve_falls_and_a_higher_value_is_drawn_higher():
    root = ElementTree.fromstring(line_chart({"loss": [(0, 3.0), (10, 2.0), (20, 0.5)]}, "loss"))
    points = [tuple(map(float, corner.split(","))) for corner in root.find("polyline").attrib["points"].split()]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)


def test_no_curves_no_chart():
    assert line_chart({"loss": []}, "loss") == ""
