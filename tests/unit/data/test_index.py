"""The index against the tars, and every way in which a shard set can be broken."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from coupalign.data.index import read_index, write_index
from coupalign.data.masks import decode
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError
from tests.unit.data.conftest import change_index


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
    assert remote.images == index.images and remote.fingerprint == index.fingerprint


def test_writing_what_was_read_gives_the_same_bytes(packed: Path) -> None:
    before = (packed / "index.json").read_bytes()
    write_index(read_index(packed))
    assert (packed / "index.json").read_bytes() == before


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
        (lambda tree: tree["images"][0].update(shard=-1), "image 9 is outside shard -1"),
        (lambda tree: tree["images"][0].update(jpg=[512, 10**9]), "image 9 is outside shard 0"),
        (lambda tree: tree["images"][0].update(jpg=[-1, 9]), "is not an offset and a length"),
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
