"""What is asked of a model: files of pairs and folders, and every line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from coupalign.errors import InputError
from coupalign.predict.requests import folder_requests, read_requests


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.csv", "", "line 1: no column image and sentence"),
        ("p.csv", "image,text\n", "line 1: no column sentence; the columns are image,text"),
        ("p.csv", "image,sentence\n", "holds no pairs"),
        ("p.csv", "image,sentence\na.png,red\na.png\n", "line 3: the sentence is missing"),
        ("p.csv", "image,sentence\na.png,red\n,star\n", "line 3: the image is missing"),
        (
            "p.csv",
            "image,sentence\na.png,star, left\n",
            "line 2: more fields than columns; a sentence with a comma needs quotes",
        ),
        ("p.csv", "image,sentence\na.png,red\nb.png,red\n", "line 3: no such image: .*b.png"),
        ("p.csv", "image,sentence\na.png,...\n", "line 2: .*holds no words"),
        ("p.jsonl", '{"image": "a.png", "sentence": "red"}\n{"image"\n', "line 2: not valid JSON"),
        ("p.jsonl", '["a.png", "red"]\n', "line 1: an object"),
        ("p.jsonl", '{"image": "a.png", "sentence": 3}\n', "line 1: the sentence is missing"),
        ("p.txt", "a.png red\n", "pairs are read from .csv or .jsonl, not from .txt"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, name: str, text: str, message: str):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: {message}"):
        read_requests(tmp_path / name)


def test_a_folder_is_its_images_by_name(tmp_path: Path):
    for name in ("b.png", "a.JPG", "b.jpg", ".c.png", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    found = folder_requests(tmp_path, "star")
    assert [(pair.given, pair.name) for pair in found] == [
        ("a.JPG", "a"),
        ("b.jpg", "b.jpg"),
        ("b.png", "b.png"),
    ]
    assert all(pair.image == tmp_path / pair.given and pair.sentence == "star" for pair in found)


def test_a_folder_of_nothing_and_a_sentence_of_nothing_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no images \(\.bmp, \.jpeg"):
        folder_requests(tmp_path, "star")
    with pytest.raises(InputError, match="holds no words"):
        folder_requests(tmp_path, "?!")
