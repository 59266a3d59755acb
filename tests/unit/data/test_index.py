"""The index against the tars, and every way in which a shard set can be broken."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from coupalign.data.index import read_index, write_index
from coupalign.data.masks import decode
from coupalign.data.packing.verify import check_jpeg, count_entries, verify
from coupalign.errors import InputError


def change_index(packed: Path, change) -> None:
    file = packed / "index.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def replace_in_tar(tar: Path, offset: int, data: bytes) -> None:
    with open(tar, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def forget_sha256(packed: Path) -> None:
    """Make the index agree with changed tars, so that only the samples can tell."""

    def change(tree: dict) -> None:
        for shard in tree["shardlist"]:
            shard["sha256"] = hashlib.sha256((packed / shard["url"]).read_bytes()).hexdigest()

    change_index(packed, change)


def test_every_file_lies_at_its_offset(packed: Path, refer_root: Path) -> None:
    index = read_index(packed)
    assert [s.url for s in index.shards] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    assert [i.image_id for i in index.images] == sorted(i.image_id for i in index.images) and len(
        index.images
    ) == 12
    for image in index.images:
        data = Path(index.address(image.shard)).read_bytes()
        record = json.loads(data[image.json[0] : sum(image.json)])
        original = (refer_root / "images/train2014" / record["file_name"]).read_bytes()
        assert data[image.jpg[0] : sum(image.jpg)] == original
        assert (
            record["image_id"] == image.image_id
            and record["file_name"] == f"COCO_train2014_{image.image_id:012d}.jpg"
        )
        for ref, entry in zip(record["refs"], image.refs, strict=True):
            assert (f"{ref['dataset']}/{ref['split_by']}", ref["split"], ref["ref_id"]) == (
                entry.set,
                entry.split,
                entry.ref_id,
            )
            assert entry.sentences == len(ref["sentences"])
            assert decode(ref["rle"]).sum() == ref["area"] > 0 and decode(ref["rle"]).shape == (
                record["height"],
                record["width"],
            )


def test_plain_tarfile_agrees(packed: Path) -> None:
    for number, shard in enumerate(read_index(packed).shards):
        with tarfile.open(packed / shard.url) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uname, m.gname, m.mode, m.uid) for m in members} == {
            (0, "coupalign", "coupalign", 0o444, 0)
        }
        spans = [
            span for i in read_index(packed).images if i.shard == number for span in (i.jpg, i.json)
        ]
        assert [(m.offset_data, m.size) for m in members] == spans


def test_the_location_may_be_a_directory_a_file_or_a_url(packed: Path) -> None:
    text = (packed / "index.json").read_bytes()
    index = read_index(packed)
    assert index == read_index(str(packed) + "/") == read_index(packed / "index.json")
    assert index.fingerprint == hashlib.sha256(text).hexdigest()
    remote = read_index("https://host/shards/index.json", text)
    assert (
        remote.address(1)
        == "https://host/shards/shard-000001.tar"
        == read_index("https://host/shards", text).address(1)
    )
    assert remote.vocabulary_address == "https://host/shards/vocab.txt"
    assert remote.images == index.images and remote.fingerprint == index.fingerprint


def test_writing_what_was_read_gives_the_same_bytes(packed: Path) -> None:
    before = (packed / "index.json").read_bytes()
    write_index(read_index(packed))
    assert (packed / "index.json").read_bytes() == before


def test_verify_is_content_with_a_whole_set(packed: Path) -> None:
    report = verify(packed)
    assert report.ok and report.problems == () and report.samples == 12 and report.shards == 3
    assert "whole" in report.table() and "refcoco/unc" in report.table()
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert report.counts == count_entries(read_index(packed).images)
    assert report.counts["refcocog/umd"]["val"] == {"images": 1, "refs": 2, "sentences": 7}


def test_a_flipped_byte_is_found_by_its_shard(packed: Path) -> None:
    for number in range(3):
        broken = shutil.copytree(packed, packed.parent / f"broken{number}")
        tar = broken / f"shard-{number:06d}.tar"
        data = bytearray(tar.read_bytes())
        data[len(data) // 3] ^= 1
        tar.write_bytes(data)
        report = verify(broken)
        assert not report.ok and f"shard-{number:06d}.tar: sha256" in report.table()
        assert all(f"shard-{number:06d}.tar" in problem for problem in report.problems)


@pytest.mark.parametrize("keep", [0, 100, 5000, -10240, -1])
def test_a_truncated_tar(packed: Path, keep: int) -> None:
    tar = packed / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    report = verify(packed)
    assert (
        not report.ok
        and "shard-000001.tar" in report.problems[0]
        and "truncated" in report.problems[0]
    )
    assert not any("shard-000000" in p or "shard-000002" in p for p in report.problems)


def test_a_jpeg_cut_short(packed: Path) -> None:
    image = read_index(packed).images[5]
    half = image.jpg[1] // 2
    replace_in_tar(
        packed / f"shard-{image.shard:06d}.tar", image.jpg[0] + half, bytes(image.jpg[1] - half)
    )
    forget_sha256(packed)

    def shorten(tree: dict) -> None:
        tree["images"][5]["jpg"][1] = half

    change_index(packed, shorten)
    problems = "\n".join(verify(packed).problems)
    assert f"sample {image.image_id:012d}: ValueError: the JPEG does not decode" in problems


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda record: record["refs"][0].update(area=1), "a mask of [0-9]+ pixels, `area` says 1"),
        (lambda record: record["refs"][1].update(split="x"), "its refs are not those of the index"),
        (lambda record: record.update(refs=[]), "its refs are not those of the index"),
        (lambda record: record.update(height=1), "run lengths are of size"),
        (lambda record: record.update(image_id=8), "its json is of image 8"),
        (lambda record: record.pop("width"), "KeyError: 'width'"),
    ],
)
def test_a_changed_record(packed: Path, change, words: str) -> None:
    image = read_index(packed).images[0]
    tar = packed / "shard-000000.tar"
    record = json.loads(tar.read_bytes()[image.json[0] : sum(image.json)])
    change(record)
    changed = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    replace_in_tar(
        tar, image.json[0], changed.ljust(image.json[1])
    )  # blanks after the value are still JSON
    forget_sha256(packed)
    (problem,) = verify(packed).problems
    assert re.search(f"shard-000000.tar: sample 000000000009: .*{words}", problem)


def test_missing_shard_changed_vocabulary_and_counts(packed: Path) -> None:
    (packed / "shard-000002.tar").unlink()
    (packed / "vocab.txt").write_text("[PAD]\n")
    change_index(packed, lambda tree: tree["counts"]["refcoco/unc"]["val"].update(refs=5))
    text = verify(packed).table()
    assert (
        "shard-000002.tar: missing" in text
        and "vocab.txt" in text
        and "counts" in text
        and "3 problems" in text
    )
    (packed / "vocab.txt").unlink()
    assert "vocab.txt: missing" in verify(packed).table()


def test_an_index_of_another_version_names_both(packed: Path) -> None:
    change_index(packed, lambda tree: tree.update(format_version=2, tool="coupalign 9.0"))
    for use in (read_index, verify):
        with pytest.raises(
            InputError, match=r"index\.json: format_version 2, this tool reads 1; .*coupalign 9\.0"
        ):
            use(packed)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tree: tree.update(format="other"), "not an index of coupalign-shards"),
        (lambda tree: tree.pop("images"), "damaged index .*images"),
        (lambda tree: tree["images"][0].update(shard=3), "damaged index"),
        (lambda tree: tree["images"][0].update(shard=-1), "image 9 lies outside shard -1"),
        (lambda tree: tree["images"][0].update(jpg=[512, 10**9]), "image 9 lies outside shard 0"),
        (lambda tree: tree["images"][0].update(jpg=[-1, 9]), "is no place in a file"),
        (lambda tree: tree["images"][0].update(jpg=[1]), "damaged index"),
        (lambda tree: tree["shardlist"][0].update(url="../../etc/passwd"), "not a plain file name"),
        (lambda tree: tree.update(vocabulary="/etc/passwd"), "not a plain file name"),
    ],
)
def test_damaged_indexes_are_refused(packed: Path, change, words: str) -> None:
    change_index(packed, change)
    with pytest.raises(InputError, match=words):
        read_index(packed)


def test_no_index_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; is .* packed"):
        read_index(tmp_path / "nowhere")
    for text in (b"{", b"[]", b"\xff"):
        (tmp_path / "index.json").write_bytes(text)
        with pytest.raises(InputError, match=r"index\.json"):
            read_index(tmp_path)


def test_pictures_are_decoded_to_the_end(refer_root: Path) -> None:
    from PIL import Image

    data = (refer_root / "images/train2014/COCO_train2014_000000000009.jpg").read_bytes()
    check_jpeg(data, 48, 64)
    with pytest.raises(ValueError, match="64 x 48, its annotations are for 48 x 64"):
        check_jpeg(data, 64, 48)
    with pytest.raises(ValueError, match="does not decode"):
        check_jpeg(data[:-300], 48, 64)
    png = io.BytesIO()
    Image.new("RGB", (64, 48)).save(png, "PNG")
    with pytest.raises(ValueError, match="PNG"):
        check_jpeg(png.getvalue(), 48, 64)
