"""The file of rows: what is written comes back, and damaged or foreign files are refused."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.errors import InputError
from coupalign.evaluation.evaluator import evaluate
from coupalign.evaluation.metrics import ious
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import COLUMNS, Rows, read_rows, rows_path, write_rows
from tests.unit.evaluation.examples import ExampleLoader, evaluate_one, infer

FIELDS = ("counts", "image_ids", "area", "pixels", "same_class")
HEAD = ",".join(COLUMNS) + "\n"


@pytest.fixture
def rows() -> Rows:
    loader = ExampleLoader()
    return Rows.from_integers(evaluate_one(loader).rows, loader.names_and_sentences)


def test_rows_come_back_from_file(tmp_path: Path, rows: Rows):
    write_rows(tmp_path / "rows.csv", rows)
    again = read_rows(tmp_path / "rows.csv")

    names, sentences = zip(*ExampleLoader().names_and_sentences)
    assert again.names == rows.names == names
    assert again.sentences == rows.sentences == sentences
    for field in FIELDS:
        assert getattr(again, field).tolist() == getattr(rows, field).tolist(), field
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.csv"]


ANY_TEXT = st.text() | st.text(alphabet="=+-@\t\r\n'\",＝ a\0\x0b\u2028")


@settings(deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=1, max_size=5))
def test_any_text_comes_back_from_file_and_is_no_formula(texts: list[tuple[str, str]]):
    integers = np.asarray([[number, 1, 2, 1, 2, 9, 5, 100, 1] for number in range(len(texts))])
    rows = Rows.from_integers(integers, texts)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_rows(path, rows)
        again = read_rows(path)
        with open(path, encoding="utf-8", newline="") as file:
            cells = [line[column] for line in csv.reader(file) for column in (0, -1)]

    assert list(zip(again.names, again.sentences)) == texts
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells)


@pytest.mark.parametrize("sentence", ["x" * 300_000, "\udce9 half", "'quoted' apostrophe", ""])
def test_strange_sentence_never_makes_the_file_unreadable(tmp_path: Path, sentence: str):
    rows = Rows.from_integers(np.asarray([[0, 1, 2, 1, 2, 9, 5, 100, 1]]), [("a/b/1/2", sentence)])

    write_rows(tmp_path / "rows.csv", rows)

    assert read_rows(tmp_path / "rows.csv").sentences == (sentence.replace("\udce9", "\\udce9"),)
    assert csv.field_size_limit() == 131072


def test_file_has_documented_columns_and_ious(tmp_path: Path, rows: Rows):
    write_rows(tmp_path / "rows.csv", rows)

    header, *lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert header == (
        "sample_id,intersection,union,iou,boundary_intersection,boundary_union,"
        "image_id,area,pixels,same_class,sentence"
    )
    assert len(lines) == 23
    written = [float(line.split(",")[3]) for line in lines]
    assert written == pytest.approx(ious(rows.counts), abs=1e-6)


def test_take_selects_rows_in_order(rows: Rows):
    some = rows.take(np.asarray([4, 2]))

    assert len(some) == 2
    assert some.names == (rows.names[4], rows.names[2])
    assert some.area.tolist() == rows.area[[4, 2]].tolist()


def test_rows_of_one_rule_keep_their_names_and_are_renumbered(tmp_path: Path):
    loader = ExampleLoader(both_rules=True)
    results = evaluate(infer, loader, [find_protocol("ris-v1")], bootstrap=0)
    integers = results["ris-v1", "first"].rows

    rows = Rows.from_integers(integers, loader.names_and_sentences)
    write_rows(tmp_path / "first.csv", rows)

    assert rows.names == tuple(name for name, _ in loader.names_and_sentences[::2])
    assert read_rows(tmp_path / "first.csv").counts[:, 0].tolist() == list(range(12))


def test_failed_write_keeps_old_file(tmp_path: Path, rows: Rows):
    path = tmp_path / "rows.csv"
    path.write_text("old")

    with pytest.raises(ValueError):
        write_rows(path, replace(rows, names=rows.names[:-1]))

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1"),
        ("a,b\n", "line 1"),
        (HEAD, "holds no sample"),
        (f"{HEAD}x,1,2,0.5,1,2,9,1,4,-1,the one\ny,1\n", "line 3"),
        (f"{HEAD}x,one,2,0.5,1,2,9,1,4,-1,the one\n", "line 2"),
        (f"{HEAD}x,1,2,0.5,1,2,9,1,4,-1,7,the one\n", "line 2"),
        (f'{HEAD}x,1,2,0.5,1,2,9,1,4,-1,"a\nb"\ny,3,2,0.5,1,2,9,1,4,-1,c\n', "line 4: a part is"),
        (f"{HEAD}x,1,2,0.5,1,2,{2**63},1,4,-1,the one\n", "line 2: a number is too large"),
        (f"{HEAD}x,{'9' * 5000},2,0.5,1,2,9,1,4,-1,the one\n", "line 2"),
        (f'{HEAD}x,1,2,0.5,1,2,9,1,4,-1,"the one\n', "cannot be read"),
        (
            "sample_id,intersection,union,iou\nx,1,2,0.5\n",
            "line 1: .*earlier version.*coupalign eval",
        ),
    ],
)
def test_read_rows_refuses_foreign_or_old_files(tmp_path: Path, text: str, message: str):
    path = tmp_path / "rows.csv"
    path.write_text(text)

    with pytest.raises(InputError, match=f"rows.csv: {message}"):
        read_rows(path)


def test_read_rows_names_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match="none.csv"):
        read_rows(tmp_path / "none.csv")


def test_rows_path_names_split_protocol_and_rule():
    run = Path("run")

    assert rows_path(run, "val", "lavt") == run / "scores" / "val-lavt.csv"
    assert rows_path(run, "val", "lavt", "first") == run / "scores" / "val-lavt-first.csv"
