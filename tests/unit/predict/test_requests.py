"""Reading what to predict: files of pairs, folders, and every line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from coupalign.errors import InputError
from coupalign.predict.requests import folder_requests, read_requests

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
    ("p.txt", "a.png red\n", "pairs are read from .csv or .jsonl, not from .txt"),
]


@pytest.mark.parametrize("name, text, message", BAD_FILES)
def test_wrong_line_is_named_with_file_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)

    with pytest.raises(InputError, match=rf"{name}: {message}"):
        read_requests(tmp_path / name)


def test_folder_gives_its_images_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "b.jpg", ".c.png", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()

    requests = folder_requests(tmp_path, "star")

    names = [(request.given, request.name) for request in requests]
    assert names == [("a.JPG", "a"), ("b.jpg", "b.jpg"), ("b.png", "b.png")]
    for request in requests:
        assert request.image == tmp_path / request.given
        assert request.sentence == "star"


def test_folder_without_images_and_sentence_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no images \(\.bmp, \.jpeg"):
        folder_requests(tmp_path, "star")
    with pytest.raises(InputError, match="holds no words"):
        folder_requests(tmp_path, "?!")
