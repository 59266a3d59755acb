"""Reading what to predict: files of pairs, folders, and every line that is wrong."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coupalign.errors import InputError
from coupalign.predict.requests import (
    folder_requests,
    normalize_sentence,
    read_requests,
    short_name,
)

HEADER = "image,sentence\n"
BAD_FILES = [
    ("p.csv", "", "line 1: no column image and sentence"),
    ("p.csv", "image,text\n", "line 1: no column sentence; the columns are image,text"),
    ("p.csv", HEADER, "holds no pairs"),
    ("p.csv", HEADER + "a.png,red\na.png\n", "line 3: the sentence is missing"),
    ("p.csv", HEADER + "a.png,red\n,star\n", "line 3: the image is missing"),
    (
        "p.csv",
        HEADER + "a.png,star, left\n",
        "line 2: more fields than columns; a sentence with a comma needs quotes",
    ),
    ("p.csv", HEADER + "a.png,red\nb.png,red\n", "line 3: no such image: .*b.png"),
    ("p.csv", HEADER + "a.png,...\n", "line 2: .*holds no words"),
    ("p.jsonl", '{"image": "a.png", "sentence": "red"}\n{"image"\n', "line 2: not valid JSON"),
    ("p.jsonl", '["a.png", "red"]\n', "line 1: an object"),
    ("p.jsonl", '{"image": "a.png", "sentence": 3}\n', "line 1: the sentence is missing"),
    ("p.csv", HEADER + 'a.png,"the man\na.png,dog\na.png,cat\n', "line 2: not valid CSV .*quote"),
    ("p.csv", HEADER + 'a.png,red\na.png,"the man\na.png,"dog\n', "line 3: not valid CSV"),
    ("p.csv", HEADER + 'a.png,"the man\na.png,dog"\n', "line 2: one field goes to line 3"),
    ("p.csv", HEADER + "a.png," + "x" * 200_000 + "\n", "line 2: not valid CSV .*limit"),
    ("p.csv", "image,sentence,image\n", "line 1: two columns are called image"),
    ("p.csv", HEADER + "a.png,re\0d\n", "line 2: holds a NUL"),
    ("p.csv", HEADER + "x" * 300 + ".png,red\n", "line 2: no such image"),
    ("p.jsonl", '{"image": "a.png", "sentence": "red \\ud83d"}', "line 1: .*half a character"),
    ("p.jsonl", '{"image": "a\\ud83d.png", "sentence": "red"}', "line 1: no such image"),
    ("p.jsonl", '{"image": "a\\u0000.png", "sentence": "red"}', "line 1: no such image"),
    ("p.jsonl", '{"image": "a.png", "sentence": "a", "sentence": "b"}', "line 1: .*twice"),
    ("p.jsonl", "[" * 100_000, "line 1: not valid JSON: nested too deeply"),
    ("p.txt", "a.png red\n", "pairs are read from .csv or .jsonl, not from .txt"),
]


@pytest.mark.parametrize("name, text, message", BAD_FILES)
def test_wrong_line_is_named_with_file_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)

    with pytest.raises(InputError, match=rf"{name}: {message}") as raised:
        read_requests(tmp_path / name)
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "p.csv").write_text(HEADER + "a.png,caf\u00e9\n", encoding=encoding)

        with pytest.raises(InputError, match=r"p\.csv: cannot be read as text in UTF-8"):
            read_requests(tmp_path / "p.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_marks_of_other_systems_do_not_matter(tmp_path: Path, start: str, end: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    lines = ["", "sentence,image", '"red, ""big"" star",a.png', "", "dog,a.png", ""]
    (tmp_path / "p.csv").write_text(start + end.join(lines), newline="")
    rows = ['{"image": "a.png", "sentence": "red"}', "", '{"image": "a.png", "sentence": "b"}']
    (tmp_path / "p.jsonl").write_text(start + end.join(rows), newline="")

    from_csv = read_requests(tmp_path / "p.csv")
    from_json = read_requests(tmp_path / "p.jsonl")

    assert [request.sentence for request in from_csv] == ['red, "big" star', "dog"]
    assert [request.source[-6:] for request in from_csv] == ["line 3", "line 5"]
    assert [request.sentence for request in from_json] == ["red", "b"]


@given(st.lists(st.text(st.characters(exclude_categories=["C"]), min_size=1), min_size=1))
def test_sentences_pass_through_both_kinds_of_file(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    sentences = [f"star {sentence}" for sentence in sentences]
    with open(folder / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "sentence"], *(["a.png", s] for s in sentences)])
    rows = [json.dumps({"image": "a.png", "sentence": s}) + "\n" for s in sentences]
    (folder / "p.jsonl").write_text("".join(rows))

    for name in ("p.csv", "p.jsonl"):
        assert [request.sentence for request in read_requests(folder / name)] == sentences


@pytest.mark.parametrize(
    ("sentence", "normalized"),
    [
        ("the red star.", "the red star"),
        ("star?! ", "star"),
        (" star", "star"),
        ("beach umbrella on the beach ,", "beach umbrella on the beach ,"),
        ("a sign that says ' drink 2 '.", "a sign that says ' drink 2 '."),
    ],
)
def test_only_final_punctuation_after_a_word_is_removed(sentence: str, normalized: str) -> None:
    assert normalize_sentence(sentence) == normalized


def test_sentences_of_real_data_stay_as_they_are(real_data: Path) -> None:
    for record in json.loads((real_data / "gref_google_val_gt.json").read_text()):
        assert normalize_sentence(record["sent"]) == record["sent"].strip()


def test_folder_gives_its_images_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "b.jpg", ".c.png", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()

    requests, left_out = folder_requests(tmp_path, "star")

    assert left_out == ["d.txt", "e.png/"]
    names = [(request.given, request.name) for request in requests]
    assert names == [("a.JPG", "a"), ("b.jpg", "b.jpg"), ("b.png", "b.png")]
    for request in requests:
        assert request.image == tmp_path / request.given
        assert request.sentence == "star"


def test_names_that_meet_stay_apart(tmp_path: Path) -> None:
    names = ["x.jpg", "x.png", "x.jpg.png", "y.jpg", "y.jpg.gif", "z.gif"]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "z", "PNG")

    requests, _ = folder_requests(tmp_path, "star")

    assert len({request.name for request in requests}) == 7


def test_folder_names_images_that_are_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    Image.new("RGB", (4, 4)).save(tmp_path / "without-suffix", "PNG")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(90))
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe")

    requests, left_out = folder_requests(tmp_path, "star")

    given = [request.given for request in requests]
    assert given == ["a.gif", "b.HEIC", "broken.jpg", "without-suffix"]
    assert left_out == ["pipe"]


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1),
    st.sampled_from(["", "-12"]),
)
def test_names_of_output_files_are_short_and_distinct(name: str, ending: str) -> None:
    long = name * 200

    for given_name in (name, long):
        short = short_name(given_name, ending)
        assert len(os.fsencode(short)) <= 200
        assert short.endswith(ending)
    assert short_name(long) != short_name(long + "a")


def test_folder_without_images_and_sentence_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no images \(\.avif, \.bmp"):
        folder_requests(tmp_path, "star")
    with pytest.raises(InputError, match="holds no words"):
        folder_requests(tmp_path, "?!")
