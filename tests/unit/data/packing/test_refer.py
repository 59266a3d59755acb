"""Annotation files, whole and broken."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest

from coupalign.data.packing.refer import (
    PUBLISHED,
    count_refs,
    counts_table,
    differences,
    find_images,
    read_refs,
    read_set,
)
from coupalign.errors import InputError


class Evil:
    """Runs code when a trusting reader unpickles it."""

    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


def edit(file: Path, change) -> None:
    """Read a refs or instances file, let `change` alter it, write it back in its own format."""
    if file.suffix == ".json":
        value = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(value) or value), encoding="utf-8")
    else:
        value = pickle.loads(file.read_bytes(), encoding="latin1")
        file.write_bytes(pickle.dumps(change(value) or value, protocol=2))


def test_every_record_is_read_and_sorted(refer_root: Path) -> None:
    referrals, missing = read_set(refer_root, "refcoco", "unc")
    assert not missing and [r.ref_id for r in referrals] == list(range(24))
    assert {r.file_name for r in referrals} == {
        path.name for path in (refer_root / "images/train2014").iterdir()
    }
    assert (
        sum(r.crowd for r in referrals) == 1
        and max(len(r.segmentation) for r in referrals if not r.crowd) == 2
    )
    assert count_refs(referrals) == {
        "refcoco/unc": {
            "train": {"images": 8, "refs": 16, "sentences": 41},
            "val": {"images": 2, "refs": 4, "sentences": 10},
            "testA": {"images": 1, "refs": 2, "sentences": 6},
            "testB": {"images": 1, "refs": 2, "sentences": 4},
        }
    }
    assert list(count_refs(referrals)["refcoco/unc"]) == ["train", "val", "testA", "testB"]


def test_objects_of_the_same_class_are_counted_over_all_annotations(refer_root: Path) -> None:
    """Image 9: its person, its bird and a bottle that no ref speaks of; image 138: its person is a crowd."""
    assert {r.same_class for r in read_set(refer_root, "refcoco", "unc")[0]} == {0}

    def add(tree: dict) -> None:
        first, crowd = (
            tree["annotations"][0],
            next(found for found in tree["annotations"] if found["iscrowd"]),
        )
        more = [
            {**first, "id": 1},
            {**first, "id": 2},
            {**first, "id": 3, "iscrowd": 1},
            {**first, "id": 4, "image_id": 25},
            {**crowd, "id": 5, "iscrowd": 0},
            {**crowd, "id": 6},
        ]
        tree["annotations"] += more

    edit(refer_root / "refcoco" / "instances.json", add)
    found = {
        (r.image_id, r.category): r.same_class for r in read_set(refer_root, "refcoco", "unc")[0]
    }
    expected = {(9, "person"): 2, (25, "person"): 1, (138, "person"): 1}
    assert {place: many for place, many in found.items() if many} == expected


def test_python_2_text_is_repaired_and_other_text_left_alone(refer_root: Path) -> None:
    first = read_set(refer_root, "refcoco", "unc")[0][0].sentences
    assert [s.raw for s in first][0] == "red box at the café – left"
    file = refer_root / "refcoco" / "refs(unc).p"
    file.write_bytes(
        b"\x80\x02]q\x00U\x05caf\xc3\xa9a."
    )  # a Python 2 `str`, as the real files hold
    assert read_refs(file) == ["cafÃ©"]

    def already_fine(refs: list) -> None:
        refs[0]["sentences"][0]["raw"] = "café 日本"
        refs[0]["sentences"][0]["sent"] = "café"

    edit(refer_root / "refcocog" / "refs(umd).json", already_fine)
    sentence = read_set(refer_root, "refcocog", "umd")[0][0].sentences[0]
    assert (sentence.raw, sentence.cleaned) == ("café 日本", "café")


def test_pickle_and_json_and_any_order_give_the_same_records(refer_root: Path) -> None:
    folder = refer_root / "refcoco"
    expected = read_set(refer_root, "refcoco", "unc")[0]
    refs = read_refs(folder / "refs(unc).p")
    random.Random(0).shuffle(refs)
    (folder / "refs(unc).p").unlink()
    (folder / "refs(unc).json").write_text(json.dumps(refs))
    edit(folder / "instances.json", lambda tree: {key: rows[::-1] for key, rows in tree.items()})
    assert read_set(refer_root, "refcoco", "unc")[0] == expected


def test_a_set_may_lie_in_another_folder(refer_root: Path) -> None:
    referrals, _ = read_set(refer_root, "refshapes", "unc", folder="refcoco")
    assert {r.dataset for r in referrals} == {"refshapes"} and len(referrals) == 24


@pytest.mark.parametrize(
    "place",
    [
        "images/mscoco/images/train2014",
        "images/train2014",
        "images/train2017",
        "train2017",
        "elsewhere",
    ],
)
@pytest.mark.parametrize("pattern", ["COCO_train2014_{:012d}.jpg", "{:012d}.jpg"])
def test_images_are_found_in_every_customary_place(
    refer_root: Path, place: str, pattern: str
) -> None:
    referrals = read_set(refer_root, "refcoco", "unc")[0]
    folder = refer_root / place
    old = (refer_root / "images/train2014").rename(refer_root / "old")
    folder.mkdir(parents=True)
    for image_id in {r.image_id for r in referrals} - {9, 72}:
        (old / f"COCO_train2014_{image_id:012d}.jpg").rename(folder / pattern.format(image_id))
    found, missing = find_images(refer_root, referrals, folder if place == "elsewhere" else None)
    assert (
        set(missing) == {9, 72}
        and missing[9] == "COCO_train2014_000000000009.jpg"
        and len(found) == 10
    )
    assert all(
        image.path.parent == folder and image.bytes == image.path.stat().st_size
        for image in found.values()
    )


@pytest.mark.parametrize("value", [Evil(), [Evil()], [{"ref_id": Path("x")}]])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_a_global_is_refused_and_named(
    refer_root: Path, value: object, protocol: int, capsys
) -> None:
    file = refer_root / "refcoco" / "refs(unc).p"
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(
        InputError,
        match=r"refs\(unc\)\.p: .*global (__builtin__|builtins|pathlib\S*|copy_reg|copyreg)\.\w+",
    ):
        read_set(refer_root, "refcoco", "unc")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"not a pickle", b"\x80\x02}q\x00.", b"\x80\x02]q"])
def test_damaged_refs_are_refused(refer_root: Path, damage: bytes) -> None:
    (refer_root / "refcoco" / "refs(unc).p").write_bytes(damage)
    with pytest.raises(InputError, match=r"refs\(unc\)\.p"):
        read_set(refer_root, "refcoco", "unc")


def break_annotation(tree: dict) -> None:
    tree["annotations"] = [a for a in tree["annotations"] if a["id"] != 41510]


def test_a_ref_without_its_annotation(refer_root: Path) -> None:
    edit(refer_root / "refcoco" / "instances.json", break_annotation)
    with pytest.raises(
        InputError,
        match=r"refs\(unc\)\.p: ref ref_id 5 \(ann_id 41510, .*not in instances.json.*skip",
    ):
        read_set(refer_root, "refcoco", "unc")
    referrals, missing = read_set(refer_root, "refcoco", "unc", skip_missing=True)
    assert len(referrals) == 23 and len(missing) == 1 and "ann_id 41510" in missing[0]


def test_a_ref_without_its_image_record(refer_root: Path) -> None:
    edit(refer_root / "refcoco" / "instances.json", lambda tree: tree["images"].pop(0) and None)
    with pytest.raises(InputError, match="ref_id 0 .*image_id 9 is not in instances.json"):
        read_set(refer_root, "refcoco", "unc")
    assert len(read_set(refer_root, "refcoco", "unc", skip_missing=True)[1]) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda refs: refs[3].pop("sentences"), "ref_id 3 .*has no 'sentences'"),
        (lambda refs: refs[3].update(sentences=[]) or refs, "ref_id 3 .*no sentences"),
        (lambda refs: refs[3]["sentences"][0].pop("sent") and refs, "ref_id 3 .*has no 'sent'"),
        (lambda refs: refs[3]["sentences"][0].update(sent=None) or refs, "ref_id 3"),
        (
            lambda refs: refs[3].update(image_id=9) or refs,
            "ref_id 3 .*its annotation is on image 25, the ref on 9",
        ),
        (lambda refs: refs[3].pop("ann_id") and refs, "ref_id 3 .*has no 'ann_id'"),
        (lambda refs: refs.append(dict(refs[3])), "ref_id 3 is given twice"),
        (lambda refs: refs.append(17), "ref 17"),
    ],
)
def test_malformed_refs_are_named(refer_root: Path, change, words: str) -> None:
    def apply(refs: list) -> list:
        change(refs)
        return refs

    edit(refer_root / "refcoco" / "refs(unc).p", apply)
    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: .*{words}"):
        read_set(refer_root, "refcoco", "unc")


def test_malformed_instances_are_named(refer_root: Path) -> None:
    file = refer_root / "refcoco" / "instances.json"
    edit(file, lambda tree: tree["annotations"][2].update(segmentation=[[1.0, 2.0, 3.0]]))
    with pytest.raises(InputError, match=r"ref_id 2 .*pairs"):
        read_set(refer_root, "refcoco", "unc")
    edit(file, lambda tree: tree.update(categories=[]))
    with pytest.raises(InputError, match="category_id 1 is not in instances.json"):
        read_set(refer_root, "refcoco", "unc")
    file.write_text("{")
    with pytest.raises(InputError, match="instances.json: not a COCO instances file"):
        read_set(refer_root, "refcoco", "unc")
    file.unlink()
    with pytest.raises(InputError, match="instances.json: no such file"):
        read_set(refer_root, "refcoco", "unc")


def test_missing_files_say_what_is_there(refer_root: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"neither refs\(umd\)\.p nor refs\(umd\)\.json.*refs\(google\)\.p, refs\(unc\)\.p",
    ):
        read_set(refer_root, "refcoco", "umd")
    with pytest.raises(InputError, match=r"refcoco\+: no such folder"):
        read_set(refer_root, "refcoco+", "unc")


def test_counts_are_compared_with_the_published_ones() -> None:
    full = {
        name: {
            split: {"images": images, "refs": refs, "sentences": sentences or 7}
            for split, (images, refs, sentences) in splits.items()
        }
        for name, splits in PUBLISHED.items()
    }
    assert differences(full) == []
    full["refcoco/unc"]["val"]["refs"] = 3800
    full["refcoco/google"].pop("test")
    full["mine/unc"] = {"train": {"images": 1, "refs": 1, "sentences": 1}}
    lines = differences(full)
    assert len(lines) == 2
    assert (
        "refcoco/unc val" in lines[0]
        and "3,800 refs" in lines[0]
        and "1,500 / 3,811 / 10,834" in lines[0]
    )
    assert "refcoco/google test: 0 images" in lines[1] and "4,527 / 5,000 / ?" in lines[1]
    assert "142,210" not in counts_table(full) and "16,994 / 42,404 / 120,624" in counts_table(full)


def test_real_records(real_data: Path) -> None:
    root = real_data / "real_records"
    sets = [
        ("refcoco", "unc"),
        ("refcoco", "google"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
    ]
    referrals = [r for dataset, split_by in sets for r in read_set(root, dataset, split_by)[0]]
    assert len(referrals) == 28 and sum(len(r.sentences) for r in referrals) == 72
    found, missing = find_images(root, referrals)
    assert not found and set(missing) == {460986, 495169, 510027, 572949}
    splits = {(r.dataset, r.split_by, r.split) for r in referrals if r.image_id == 460986}
    assert {
        ("refcoco", "unc", "train"),
        ("refcoco+", "unc", "train"),
        ("refcocog", "umd", "train"),
    } < splits
    assert ("refcocog", "google", "val") in splits  # a leak for a loader to catch
