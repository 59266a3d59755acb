"""The index compared with the tars, and every way in which an index can be broken."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from coupalign.data import index as index_module
from coupalign.data.index import read_index, write_index
from coupalign.data.masks import decode
from coupalign.data.packing.verify import verify
from coupalign.data.photos import mark_photo
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


def first_image(**fields: object):
    return lambda tree: tree["images"][0].update(fields)


def first_shard(**fields: object):
    return lambda tree: tree["shardlist"][0].update(fields)


def first_ref(number: int, value: object):
    def change(tree: dict) -> None:
        tree["images"][0]["refs"][0][number] = value

    return change


def count(key: str, value: object):
    return lambda tree: tree["counts"]["refcoco/unc"]["val"].update({key: value})


@pytest.mark.parametrize(
    "change, message",
    [
        # Shards.
        (first_shard(sha256="../../../project/poetry"), "sha256 .* is not a SHA-256"),
        (first_shard(sha256="A" * 64), "is not a SHA-256"),
        (first_shard(sha256=None), "is not a SHA-256"),
        (first_shard(url=".hidden.tar"), "not a plain file name"),
        (first_shard(url="a\nb.tar"), "not a plain file name"),
        (first_shard(url="x" * 300), "not a plain file name"),
        (first_shard(url=5), "not a plain file name"),
        (first_shard(url="shard-000001.tar"), "url 'shard-000001.tar' is there twice"),
        (first_shard(filesize=2**70), "filesize .* is not a whole number"),
        (first_shard(filesize=1.5), "filesize 1.5 is not a whole number"),
        (first_shard(filesize=True), "filesize True is not a whole number"),
        (first_shard(nsamples=5), "5 samples according to `shardlist`, 4 to `images`"),
        (lambda tree: tree.update(shardlist={}), "damaged index"),
        (lambda tree: tree.update(shardlist=None), "damaged index"),
        (lambda tree: tree["shardlist"].append(5), "damaged index"),
        # Images.
        (first_image(id="9"), "id '9' is not a whole number"),
        (first_image(id=2**63), "is not a whole number"),
        (first_image(id=float("inf")), "it holds Infinity"),
        (first_image(id=25), "image id 25 is there twice"),
        (first_image(jpg=[2**65, 5]), "is not an offset and a length"),
        (first_image(jpg=[512, 10**14]), "is not an offset and a length"),
        (first_image(jpg="ab"), "is not an offset and a length"),
        (first_image(json=[0, 1812]), "overlaps the file before it"),
        (lambda tree: tree["images"].append(tree["images"][3]), "is not in the order"),
        (lambda tree: tree["images"].insert(1, tree["images"][0]), "overlaps the file before"),
        (lambda tree: tree["images"].pop(0), "4 samples according to `shardlist`, 3"),
        (lambda tree: tree["images"].reverse(), "overlaps the file before it"),
        (first_image(photo=[9, "0" * 16]), "damaged index"),
        (first_image(photo=[9, "../x", "0" * 64]), "is not the hash of a photograph"),
        (first_image(photo=None), "damaged index"),
        # Refs.
        (first_ref(0, "refcoco"), "set 'refcoco' is not a plain name"),
        (first_ref(0, "../unc"), "is not a plain name"),
        (first_ref(0, "a/b/c"), "is not a plain name"),
        (first_ref(0, "a/" + "b" * 101), "is not a plain name"),
        (first_ref(0, "\ud800/unc"), "is not a plain name"),
        (first_ref(1, ""), "split '' is not a plain name"),
        (first_ref(1, "tr/ain"), "is not a plain name"),
        (first_ref(1, None), "is not a plain name"),
        (first_ref(1, "val"), "`counts` disagrees"),
        (first_ref(2, "1"), "ref_id '1' is not a whole number"),
        (first_ref(3, -1), "sentences -1 is not a whole number"),
        (first_ref(3, 3 * 10**8), "has 3000000.. sentences in a record of .* bytes"),
        (first_ref(3, 2), "`counts` disagrees"),
        (lambda tree: tree["images"][0]["refs"][0].append(1), "damaged index"),
        (lambda tree: tree["images"][0].update(refs=None), "damaged index"),
        # Counts and names.
        (count("refs", 5), "`counts` disagrees"),
        (count("images", True), "`counts` disagrees"),
        (count("refs", 4.0), "something else than whole numbers"),
        (lambda tree: tree.update(counts=[]), "`counts` disagrees"),
        (lambda tree: tree["counts"].update({"a/b": {}}), "`counts` disagrees"),
        (lambda tree: tree.update(vocabulary="../vocab.txt"), "not a plain file name"),
        (lambda tree: tree.update(vocabulary=5), "not a plain file name"),
        (lambda tree: tree.update(vocabulary_sha256="../x"), "is not a SHA-256"),
        (lambda tree: tree.update(vocabulary_sha256=7), "is not a SHA-256"),
        (lambda tree: tree.update(name="x" * 300), "name .* is not a short text"),
        (lambda tree: tree.update(name="a\x1b[31m"), "is not a short text"),
        (lambda tree: tree.update(name=None), "is not a short text"),
        (lambda tree: tree.update(tool=[]), "tool .* is not a short text"),
        (lambda tree: tree.update(source_fingerprint={}), "is not a short text"),
        (lambda tree: tree.update(format_version=True), "format_version True"),
        (lambda tree: tree.update(format_version=[2] * 10**4), "format_version .2, 2"),
        (lambda tree: tree.pop("counts"), "no field 'counts'"),
    ],
)
def test_every_field_of_a_foreign_index_is_checked(packed: Path, change, message: str) -> None:
    change_index(packed, change)

    with pytest.raises(InputError, match=message) as failed:
        read_index(packed)

    assert "index.json: " in str(failed.value) and len(str(failed.value)) < 700
    assert "\n" not in str(failed.value)


def test_index_with_too_many_sentences_is_refused(packed: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "MAX_SENTENCES", 30)

    with pytest.raises(InputError, match="more than 30 sentences, the limit"):
        read_index(packed)


def test_index_with_too_many_bytes_is_refused(packed: Path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", 1000)

    with pytest.raises(InputError, match="index.json: more than 1,000 bytes, the limit"):
        read_index(packed)


def test_index_of_an_early_version_has_no_marks(packed: Path) -> None:
    def forget(tree: dict) -> None:
        for image in tree["images"]:
            del image["photo"]

    with_marks = read_index(packed)
    change_index(packed, forget)
    index = read_index(packed)

    assert {image.photo for image in index.images} == {None}
    assert [replace(image, photo=None) for image in with_marks.images] == list(index.images)
    assert verify(packed).ok


def test_marks_are_those_of_the_stored_photographs(packed: Path) -> None:
    index = read_index(packed)

    for image in index.images:
        data = Path(index.address(image.shard)).read_bytes()[image.jpg[0] : sum(image.jpg)]
        assert image.photo == mark_photo(data, f"COCO_train2014_{image.image_id:012d}.jpg")
        assert image.photo.number == image.image_id


def test_missing_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; is .* packed"):
        read_index(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000]
)
def test_file_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "index.json").write_bytes(text)

    with pytest.raises(InputError, match=r"index\.json"):
        read_index(tmp_path)
