"""Verifying a packed shard set: a whole one passes, every kind of damage is found."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from coupalign.data.index import read_index
from coupalign.data.packing.counts import count_entries
from coupalign.data.packing.verify import check_jpeg, verify
from tests.unit.data.conftest import change_index


def overwrite_in_tar(tar: Path, offset: int, data: bytes) -> None:
    with open(tar, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def update_sha256(packed: Path) -> None:
    """Make the index agree with the changed tars, so that only the samples give the damage away."""

    def change(tree: dict) -> None:
        for shard in tree["shardlist"]:
            shard["sha256"] = hashlib.sha256((packed / shard["url"]).read_bytes()).hexdigest()

    change_index(packed, change)


def test_whole_set_has_no_problems(packed: Path) -> None:
    report = verify(packed)

    assert report.ok
    assert report.problems == ()
    assert (report.samples, report.shards) == (12, 3)
    assert report.counts == count_entries(read_index(packed).images)
    assert report.counts["refcocog/umd"]["val"] == {"images": 1, "refs": 2, "sentences": 7}
    assert "whole" in report.table()
    assert "refcoco/unc" in report.table()
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_flipped_byte_is_reported_for_its_shard_only(packed: Path) -> None:
    for number in range(3):
        broken = shutil.copytree(packed, packed.parent / f"broken{number}")
        tar = broken / f"shard-{number:06d}.tar"
        data = bytearray(tar.read_bytes())
        data[len(data) // 3] ^= 1
        tar.write_bytes(data)

        report = verify(broken)

        assert not report.ok
        assert f"shard-{number:06d}.tar: sha256" in report.table()
        assert all(f"shard-{number:06d}.tar" in problem for problem in report.problems)


@pytest.mark.parametrize("keep", [0, 100, 5000, -10240, -1])
def test_truncated_tar_is_reported(packed: Path, keep: int) -> None:
    tar = packed / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:keep])

    report = verify(packed)

    assert not report.ok
    assert "shard-000001.tar" in report.problems[0]
    assert "truncated" in report.problems[0]
    assert not any("shard-000000" in p or "shard-000002" in p for p in report.problems)


def test_jpeg_cut_short_is_reported(packed: Path) -> None:
    image = read_index(packed).images[5]
    tar = packed / f"shard-{image.shard:06d}.tar"
    half = image.jpg[1] // 2
    overwrite_in_tar(tar, image.jpg[0] + half, bytes(image.jpg[1] - half))
    update_sha256(packed)

    def shorten(tree: dict) -> None:
        tree["images"][5]["jpg"][1] = half

    change_index(packed, shorten)

    problems = "\n".join(verify(packed).problems)
    assert f"sample {image.image_id:012d}: the JPEG does not decode" in problems


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda record: record["refs"][0].update(area=1), "a mask of [0-9]+ pixels, `area` says 1"),
        (
            lambda record: record["refs"][1].update(split="x"),
            "refcoco/unc/1: the record is of ref 1 in 'refcoco/unc', split 'x'; the index says",
        ),
        (lambda record: record["refs"][0].update(ref_id=True), "`ref_id` is True, not a whole"),
        (lambda record: record["refs"][0].pop("crowd"), "no field 'crowd'"),
        (lambda record: record["refs"][0].update(same_class=-2), "`same_class` is -2"),
        (lambda record: record["refs"][0].update(category=None), "`category` is None"),
        (lambda record: record["refs"][0]["sentences"].pop(), "3 sentences, the index says 4"),
        (lambda record: record["refs"][0]["sentences"][1].update(sent=5), "`sent` is 5, not a"),
        (lambda record: record["refs"][0]["sentences"][1].pop("raw"), "no field 'raw'"),
        (lambda record: record["refs"][0].update(sentences=[[]] * 4), "a sentence is "),
        (lambda record: record["refs"][0].update(rle=[]), "`rle` is .*, not an object"),
        (lambda record: record["refs"][0]["rle"].update(counts="50"), "cover 5 of 3072 pixels"),
        (lambda record: record["refs"][0]["rle"].pop("counts"), "not an rle with a size"),
        (lambda record: record["refs"][0]["rle"].pop("size"), "run lengths are of size None"),
        (lambda record: record.update(refs=[]), "the record has 0 refs, the index says 4"),
        (lambda record: record.update(height=1), "run lengths are of size"),
        (lambda record: record.update(height=0), "height is 0, not a number of pixels"),
        (lambda record: record.update(height="48"), "height is '48', not a number of pixels"),
        (lambda record: record.update(image_id=8), "the record is of image 8"),
        (lambda record: record.pop("width"), "width is None, not a number of pixels"),
        (lambda record: record.update(width=float("nan")), "it holds NaN"),
    ],
)
def test_changed_record_is_reported(packed: Path, change, problem: str) -> None:
    image = read_index(packed).images[0]
    tar = packed / "shard-000000.tar"
    record = json.loads(tar.read_bytes()[image.json[0] : sum(image.json)])
    record["file_name"] = ""  # makes room for the change
    change(record)
    changed = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    padded = changed.ljust(image.json[1])  # blanks after the value are still JSON
    overwrite_in_tar(tar, image.json[0], padded)
    update_sha256(packed)

    (reported,) = verify(packed).problems

    assert re.search(f"shard-000000.tar: sample 000000000009: .*{problem}", reported)


def test_missing_shard_and_changed_vocabulary_are_reported(packed: Path) -> None:
    (packed / "shard-000002.tar").unlink()
    (packed / "vocab.txt").write_text("[PAD]\n")

    table = verify(packed).table()

    assert "shard-000002.tar: missing" in table
    assert "vocab.txt" in table
    assert "2 problems" in table

    (packed / "vocab.txt").unlink()
    assert "vocab.txt: missing" in verify(packed).table()


HUGE = b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7
LARGEST = b"77777777777\0"


@pytest.mark.parametrize(
    "size, kind",
    [(HUGE, b"0"), (b"\xff" * 12, b"0"), (LARGEST, b"0"), (LARGEST, b"x"), (LARGEST, b"L")]
    + [(b"00000001000\0", b"S"), (b"not a size!\0", b"0"), (b"\0" * 12, b"0")],
)
def test_header_with_an_impossible_size_is_reported(packed: Path, size: bytes, kind: bytes) -> None:
    tar = packed / "shard-000000.tar"
    header = bytearray(tar.read_bytes()[:512])
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    overwrite_in_tar(tar, 0, bytes(header))

    problems = "\n".join(verify(packed).problems)

    assert "shard-000000.tar: not a complete tar" in problems or "not those of" in problems


def test_damaged_index_is_a_problem(packed: Path) -> None:
    change_index(packed, lambda tree: tree["counts"]["refcoco/unc"]["val"].update(refs=5))

    report = verify(packed)

    assert not report.ok and "`counts` disagrees" in report.table()
    assert report.to_json()["problems"] == list(report.problems)


@pytest.mark.parametrize(
    "mark, problem",
    [
        ([9, "0" * 16, None], "its photograph is not the one that the index describes"),
        ([10, None, None], "its photograph is not the one that the index describes"),
        ([9, None, "0" * 64], "the index describes another picture"),
    ],
)
def test_mark_of_another_photograph_is_reported(
    packed: Path, mark: list[object], problem: str
) -> None:
    def change(tree: dict) -> None:
        photo = tree["images"][0]["photo"]
        tree["images"][0]["photo"] = [new or old for new, old in zip(mark, photo)]

    change_index(packed, change)

    (reported,) = verify(packed).problems

    assert f"sample 000000000009: {problem}" in reported


def test_check_jpeg_decodes_the_whole_picture(refer_root: Path) -> None:
    data = (refer_root / "images/train2014/COCO_train2014_000000000009.jpg").read_bytes()
    png = io.BytesIO()
    Image.new("RGB", (64, 48)).save(png, "PNG")

    check_jpeg(data, 48, 64)

    with pytest.raises(ValueError, match="64 x 48, .* 48 x 64"):
        check_jpeg(data, 64, 48)
    with pytest.raises(ValueError, match="does not decode"):
        check_jpeg(data[:-300], 48, 64)
    with pytest.raises(ValueError, match="PNG"):
        check_jpeg(png.getvalue(), 48, 64)
