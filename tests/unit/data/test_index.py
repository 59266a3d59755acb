"""The index compared with the tars, and every way in which an index can be broken."""

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


def test_shards_and_images_are_sorted(packed: Path) -> None:
    index = read_index(packed)

    assert [shard.url for shard in index.shards] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    image_ids = [image.image_id for image in index.images]
    assert image_ids == sorted(image_ids) and len(image_ids) == 12


def test_every_file_is_at_its_offset(packed: Path, refer_root: Path) -> None:
    index = read_index(packed)

    for image in index.images:
        data = Path(index.address(image.shard)).read_bytes()
        record = json.loads(data[image.json[0] : sum(image.json)])
        assert record["image_id"] == image.image_id
        assert record["file_name"] == f"COCO_train2014_{image.image_id:012d}.jpg"

        original = (refer_root / "images/train2014" / record["file_name"]).read_bytes()
        assert data[image.jpg[0] : sum(image.jpg)] == original


def test_entries_describe_the_records(packed: Path) -> None:
    index = read_index(packed)

    for image in index.images:
        data = Path(index.address(image.shard)).read_bytes()
        record = json.loads(data[image.json[0] : sum(image.json)])
        for ref, entry in zip(record["refs"], image.refs, strict=True):
            assert f"{ref['dataset']}/{ref['split_by']}" == entry.set
            assert (ref["split"], ref["ref_id"]) == (entry.split, entry.ref_id)
            assert len(ref["sentences"]) == entry.sentences

            mask = decode(ref["rle"])
            assert mask.sum() == ref["area"] > 0
            assert mask.shape == (record["height"], record["width"])


def test_tarfile_finds_the_same_spans(packed: Path) -> None:
    index = read_index(packed)

    for number, shard in enumerate(index.shards):
        with tarfile.open(packed / shard.url) as tar:
            members = tar.getmembers()

        spans = []
        for image in index.images:
            if image.shard == number:
                spans += [image.jpg, image.json]
        assert [(member.offset_data, member.size) for member in members] == spans
        assert {(m.mtime, m.uname, m.gname, m.mode, m.uid) for m in members} == {
            (0, "coupalign", "coupalign", 0o444, 0)
        }


def test_location_may_be_a_directory_or_a_file(packed: Path) -> None:
    index = read_index(packed)

    assert read_index(str(packed) + "/") == index
    assert read_index(packed / "index.json") == index
    text = (packed / "index.json").read_bytes()
    assert index.fingerprint == hashlib.sha256(text).hexdigest()


def test_location_may_be_a_url_of_either(packed: Path) -> None:
    text = (packed / "index.json").read_bytes()
    local = read_index(packed)

    for url in ("https://host/shards/index.json", "https://host/shards"):
        remote = read_index(url, text)
        assert remote.address(1) == "https://host/shards/shard-000001.tar"
        assert remote.images == local.images
        assert remote.fingerprint == local.fingerprint


def test_writing_what_was_read_gives_the_same_bytes(packed: Path) -> None:
    before = (packed / "index.json").read_bytes()

    write_index(read_index(packed))

    assert (packed / "index.json").read_bytes() == before


def test_index_of_another_version_names_both(packed: Path) -> None:
    change_index(packed, lambda tree: tree.update(format_version=2, tool="coupalign 9.0"))

    for use in (read_index, verify):
        with pytest.raises(
            InputError, match=r"index\.json: format_version 2, this tool reads 1; .*coupalign 9\.0"
        ):
            use(packed)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.update(format="other"), "not an index of coupalign-shards"),
        (lambda tree: tree.pop("images"), "damaged index .*images"),
        (lambda tree: tree["images"][0].update(shard=3), "damaged index"),
        (lambda tree: tree["images"][0].update(shard=-1), "shard -1 is not a whole number"),
        (lambda tree: tree["images"][0].update(jpg=[512, 10**9]), "image 9 is outside shard 0"),
        (lambda tree: tree["images"][0].update(jpg=[-1, 9]), "is not an offset and a length"),
        (lambda tree: tree["images"][0].update(jpg=[1]), "damaged index"),
        (lambda tree: tree["shardlist"][0].update(url="../../etc/passwd"), "not a plain file name"),
        (lambda tree: tree.update(vocabulary="/etc/passwd"), "not a plain file name"),
    ],
)
def test_damaged_index_is_refused(packed: Path, change, message: str) -> None:
    change_index(packed, change)

    with pytest.raises(InputError, match=message):
        read_index(packed)


def test_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; is .* packed"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_file_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "index.json").write_bytes(text)

    with pytest.raises(InputError, match=r"index\.json"):
        read_index(tmp_path)
