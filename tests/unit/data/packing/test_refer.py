"""Reading annotation files, whole and broken."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coupalign.data.masks import area, rle_from_segmentation
from coupalign.data.packing.counts import count_refs
from coupalign.data.packing.images import find_images
from coupalign.data.packing.refer import (
    Referral,
    Sentence,
    read_annotation_set,
    read_refs_file,
)
from coupalign.data.records import UNKNOWN
from coupalign.errors import InputError


class Evil:
    """Runs code when a trusting reader unpickles it."""

    def __reduce__(self) -> tuple:
        return (print, ("this must never run",))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Let `change` alter the value in a refs or instances file, which keeps its format."""
    if file.suffix == ".json":
        value = json.loads(file.read_text(encoding="utf-8"))
        change(value)
        file.write_text(json.dumps(value), encoding="utf-8")
    else:
        value = pickle.loads(file.read_bytes(), encoding="latin1")
        change(value)
        file.write_bytes(pickle.dumps(value, protocol=2))


# ----------------------------------------------------------------------------------- Whole files


def test_all_records_are_read_and_sorted(refer_root: Path) -> None:
    referrals, skipped = read_annotation_set(refer_root, "refcoco", "unc")

    assert not skipped
    assert [ref.ref_id for ref in referrals] == list(range(24))
    file_names = {path.name for path in (refer_root / "images/train2014").iterdir()}
    assert {ref.file_name for ref in referrals} == file_names
    assert sum(ref.crowd for ref in referrals) == 1
    assert max(len(ref.segmentation) for ref in referrals if not ref.crowd) == 2

    counts = count_refs(referrals)
    assert counts == {
        "refcoco/unc": {
            "train": {"images": 8, "refs": 16, "sentences": 41},
            "val": {"images": 2, "refs": 4, "sentences": 10},
            "testA": {"images": 1, "refs": 2, "sentences": 6},
            "testB": {"images": 1, "refs": 2, "sentences": 4},
        }
    }
    assert list(counts["refcoco/unc"]) == ["train", "val", "testA", "testB"]


def test_two_refs_of_one_annotation_keep_their_own_split_and_sentences(refer_root: Path) -> None:
    """mmdet lets the second overwrite the first."""
    file = refer_root / "refcoco" / "refs(unc).p"
    original = pickle.loads(file.read_bytes(), encoding="latin1")[0]
    twin = {
        **original,
        "ref_id": 10**6,
        "split": "val",
        "sentences": [{"sent_id": 10**6, "raw": "Another.", "sent": "another"}],
    }
    edit(file, lambda refs: refs.append(twin))

    referrals, _ = read_annotation_set(refer_root, "refcoco", "unc")

    by_id = {ref.ref_id: ref for ref in referrals}
    first, second = by_id[original["ref_id"]], by_id[10**6]
    assert first.ann_id == second.ann_id
    assert (first.split, second.split) == (original["split"], "val")
    assert len(first.sentences) == len(original["sentences"])
    assert [sentence.cleaned for sentence in second.sentences] == ["another"]


def test_same_class_counts_all_annotations_but_crowds(refer_root: Path) -> None:
    # At first, no object shares its image with another one of its class.
    before = read_annotation_set(refer_root, "refcoco", "unc")[0]
    assert {ref.same_class for ref in before} == {0}

    def add(tree: dict) -> None:
        first = tree["annotations"][0]  # the person of image 9
        crowd = next(found for found in tree["annotations"] if found["iscrowd"])  # of image 138
        tree["annotations"] += [
            {**first, "id": 1},
            {**first, "id": 2},
            {**first, "id": 3, "iscrowd": 1},
            {**first, "id": 4, "image_id": 25},
            {**crowd, "id": 5, "iscrowd": 0},
            {**crowd, "id": 6},
        ]

    edit(refer_root / "refcoco" / "instances.json", add)
    after = read_annotation_set(refer_root, "refcoco", "unc")[0]

    others = {(r.image_id, r.category): r.same_class for r in after if r.same_class}
    assert others == {(9, "person"): 2, (25, "person"): 1, (138, "person"): 1}


def test_python_2_text_is_repaired(refer_root: Path) -> None:
    first = read_annotation_set(refer_root, "refcoco", "unc")[0][0]
    assert first.sentences[0].raw == "red box at the café – left"

    # The raw list has the text as latin1, since the real files hold a Python 2 `str`.
    file = refer_root / "refcoco" / "refs(unc).p"
    file.write_bytes(b"\x80\x02]q\x00U\x05caf\xc3\xa9a.")
    assert read_refs_file(file) == ["cafÃ©"]


def test_other_text_is_left_alone(refer_root: Path) -> None:
    def change(refs: list) -> None:
        refs[0]["sentences"][0]["raw"] = "café 日本"
        refs[0]["sentences"][0]["sent"] = "café"

    edit(refer_root / "refcocog" / "refs(umd).json", change)

    sentence = read_annotation_set(refer_root, "refcocog", "umd")[0][0].sentences[0]
    assert (sentence.raw, sentence.cleaned) == ("café 日本", "café")


def test_pickle_json_and_any_order_give_the_same_records(refer_root: Path) -> None:
    folder = refer_root / "refcoco"
    expected = read_annotation_set(refer_root, "refcoco", "unc")[0]
    refs = read_refs_file(folder / "refs(unc).p")
    random.Random(0).shuffle(refs)
    (folder / "refs(unc).p").unlink()
    (folder / "refs(unc).json").write_text(json.dumps(refs))

    def reverse(tree: dict) -> None:
        for rows in tree.values():
            rows.reverse()

    edit(folder / "instances.json", reverse)

    assert read_annotation_set(refer_root, "refcoco", "unc")[0] == expected


def test_folder_can_differ_from_the_name_of_the_data_set(refer_root: Path) -> None:
    referrals, _ = read_annotation_set(refer_root, "refshapes", "unc", folder="refcoco")

    assert {ref.dataset for ref in referrals} == {"refshapes"}
    assert len(referrals) == 24


# ------------------------------------------------------------------------ Files of other makers


def first_refs(refer_root: Path, change: Callable[[list], object]) -> list[Referral]:
    edit(refer_root / "refcoco" / "refs(unc).p", change)
    return read_annotation_set(refer_root, "refcoco", "unc")[0]


def test_ref_about_several_objects_is_their_union(refer_root: Path) -> None:
    """gRefCOCO has a list of ann_ids."""
    one, two = first_refs(refer_root, lambda refs: refs[0].update(ann_id=[900, 901]))[:2]

    alone = read_annotation_set(refer_root, "refcoco", "google")[0][0]
    parts = (one.segmentation, two.segmentation, alone.segmentation)
    union, second, first = (area(rle_from_segmentation(part, 48, 64)) for part in parts)
    assert one.ann_id == (900, 901)
    assert one.category == "person, bird"
    assert one.same_class == 0
    assert union == first + second


def test_list_with_one_annotation_is_that_annotation(refer_root: Path) -> None:
    before = read_annotation_set(refer_root, "refcoco", "unc")[0][0]

    assert first_refs(refer_root, lambda refs: refs[0].update(ann_id=[900]))[0] == before


@pytest.mark.parametrize("ann_id", [[-1], -1, "-1", []])
def test_ref_without_a_target_is_refused_or_skipped(refer_root: Path, ann_id: object) -> None:
    edit(refer_root / "refcoco" / "refs(unc).p", lambda refs: refs[3].update(ann_id=ann_id))

    with pytest.raises(InputError, match="ref_id 3 .*no target.*remove it, or set `missing: skip`"):
        read_annotation_set(refer_root, "refcoco", "unc")

    referrals, skipped = read_annotation_set(refer_root, "refcoco", "unc", skip_missing=True)
    assert len(referrals) == 23
    assert "ref_id 3" in skipped[0] and "no target" in skipped[0]


def test_sentences_may_be_plain_texts(refer_root: Path) -> None:
    texts = ["the left thing", "Café"]

    first = first_refs(refer_root, lambda refs: refs[0].update(sentences=texts))[0]

    assert first.sentences == (
        Sentence(0, "the left thing", "the left thing"),
        Sentence(1, "Café", "Café"),
    )


def test_ids_may_be_texts_or_floats(refer_root: Path) -> None:
    expected = read_annotation_set(refer_root, "refcoco", "unc")[0]

    def as_texts(refs: list) -> None:
        for ref in refs:
            ref.update(ref_id=str(ref["ref_id"]), ann_id=str(ref["ann_id"]))
            ref["image_id"] = float(ref["image_id"])

    assert first_refs(refer_root, as_texts) == expected


@pytest.mark.parametrize("as_written", [str, bool, float, lambda flag: ["false", "True"][flag]])
def test_iscrowd_may_be_a_text(refer_root: Path, as_written: Callable[[int], object]) -> None:
    expected = read_annotation_set(refer_root, "refcoco", "unc")[0]

    def change(tree: dict) -> None:
        for annotation in tree["annotations"]:
            annotation["iscrowd"] = as_written(annotation["iscrowd"])

    edit(refer_root / "refcoco" / "instances.json", change)

    assert read_annotation_set(refer_root, "refcoco", "unc")[0] == expected


def test_class_of_crowds_only_has_an_unknown_number_of_objects(refer_root: Path) -> None:
    """CVAT marks every painted mask as a crowd."""

    def change(tree: dict) -> None:
        for annotation in tree["annotations"]:
            annotation["iscrowd"] = int(annotation["category_id"] == 16)

    edit(refer_root / "refcoco" / "instances.json", change)
    referrals = read_annotation_set(refer_root, "refcoco", "unc")[0]

    assert {ref.same_class for ref in referrals if ref.category == "bird"} == {UNKNOWN}
    assert {ref.same_class for ref in referrals if ref.category == "person"} == {0}


@pytest.mark.parametrize(
    "name, kept",
    [
        ("seqA/00000.jpg", "seqA/00000.jpg"),
        ("./seqA//00000.jpg", "seqA/00000.jpg"),
        ("seqA\\00000.jpg", "seqA/00000.jpg"),
        ("/home/someone/seqA/00000.jpg", "00000.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\1.jpg", "1.jpg"),
    ],
)
def test_path_of_a_picture_stays_below_its_folder(refer_root: Path, name: str, kept: str) -> None:
    edit(
        refer_root / "refcoco" / "instances.json",
        lambda tree: tree["images"][0].update(file_name=name),
    )

    assert read_annotation_set(refer_root, "refcoco", "unc")[0][0].file_name == kept


def test_two_surrogates_are_joined_to_their_character(refer_root: Path) -> None:
    def change(refs: list) -> None:
        refs[0]["sentences"][0]["sent"] = "\ud83d\ude00 left"

    assert first_refs(refer_root, change)[0].sentences[0].cleaned == "\U0001f600 left"


# ---------------------------------------------------------------------------------- Broken files


@pytest.mark.parametrize("value", [Evil(), [Evil()], [{"ref_id": Path("x")}]])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_with_a_global_is_refused_and_never_run(
    refer_root: Path, value: object, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = refer_root / "refcoco" / "refs(unc).p"
    file.write_bytes(pickle.dumps(value, protocol=protocol))

    with pytest.raises(
        InputError,
        match=r"refs\(unc\)\.p: .*global '(__builtin__|builtins|pathlib\S*|copy_reg|copyreg)\.\w+",
    ):
        read_annotation_set(refer_root, "refcoco", "unc")
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"not a pickle", b"\x80\x02}q\x00.", b"\x80\x02]q"])
def test_damaged_refs_file_is_refused(refer_root: Path, damage: bytes) -> None:
    (refer_root / "refcoco" / "refs(unc).p").write_bytes(damage)

    with pytest.raises(InputError, match=r"refs\(unc\)\.p"):
        read_annotation_set(refer_root, "refcoco", "unc")


def remove_annotation(tree: dict) -> None:
    tree["annotations"] = [a for a in tree["annotations"] if a["id"] != 41510]


def test_ref_without_its_annotation_is_refused_or_skipped(refer_root: Path) -> None:
    edit(refer_root / "refcoco" / "instances.json", remove_annotation)

    with pytest.raises(
        InputError,
        match=r"refs\(unc\)\.p: ref_id 5 \(ann_id 41510, .*not in instances.json.*skip",
    ):
        read_annotation_set(refer_root, "refcoco", "unc")

    referrals, skipped = read_annotation_set(refer_root, "refcoco", "unc", skip_missing=True)
    assert len(referrals) == 23
    assert len(skipped) == 1
    assert "ann_id 41510" in skipped[0]


def test_ref_without_its_image_record_is_refused_or_skipped(refer_root: Path) -> None:
    edit(refer_root / "refcoco" / "instances.json", lambda tree: tree["images"].pop(0))

    with pytest.raises(InputError, match="ref_id 0 .*image_id 9 is not in instances.json"):
        read_annotation_set(refer_root, "refcoco", "unc")

    _, skipped = read_annotation_set(refer_root, "refcoco", "unc", skip_missing=True)
    assert len(skipped) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda refs: refs[3].pop("sentences"), "ref_id 3 .*no field 'sentences'"),
        (lambda refs: refs[3].update(sentences=[]), "ref_id 3 .*no sentences"),
        (lambda refs: refs[3]["sentences"][0].pop("sent"), "ref_id 3 .*no field 'sent'"),
        (lambda refs: refs[3]["sentences"][0].update(sent=None), "ref_id 3"),
        (
            lambda refs: refs[3].update(image_id=9),
            "ref_id 3 .*its annotation 2501 is on image 25, the ref on 9",
        ),
        (lambda refs: refs[3].pop("ann_id"), "ref_id 3 .*no field 'ann_id'"),
        (lambda refs: refs.append(dict(refs[3])), "ref_id 3 is listed twice"),
        (lambda refs: refs.append(17), "ref 17"),
        (lambda refs: refs[3].update(ann_id=None), "`ann_id` is None"),
        (lambda refs: refs[3].update(ann_id=[2501, -1]), "`ann_id` is -1"),
        (lambda refs: refs[3].update(ann_id=[[2501]]), "`ann_id` is .*, not a whole number"),
        (lambda refs: refs[3].update(ref_id="x3"), "`ref_id` is 'x3', not a whole number"),
        (lambda refs: refs[3].update(ref_id=True), "`ref_id` is True"),
        (lambda refs: refs[3].update(ref_id=2**63), "`ref_id` is 9223372036854775808"),
        (lambda refs: refs[3].update(image_id=10**400), "`image_id` is <a whole number of 1329"),
        (lambda refs: refs[3].update(split="../val"), "`split` is '../val'"),
        (lambda refs: refs[3].update(split=None), "`split` is None, not a text"),
        (lambda refs: refs[3].update(split="x" * 200), "`split` is 'xxx"),
        (lambda refs: refs[3].update(sentences="left"), "`sentences` is 'left', not a list"),
        (lambda refs: refs[3].update(sentences=[3]), "a sentence is 3; expected a text, or"),
        (lambda refs: refs[3]["sentences"][0].update(sent=None), "`sent` is None, not a text"),
        (lambda refs: refs[3]["sentences"][1].update(sent_id=30), "sent_id 30 is listed twice"),
        (
            lambda refs: refs[3]["sentences"][0].update(sent="left \ud83d"),
            r"`sent` is 'left \\ud83d', which holds half of a character",
        ),
    ],
)
def test_malformed_ref_is_named(
    refer_root: Path, change: Callable[[list], object], message: str
) -> None:
    edit(refer_root / "refcoco" / "refs(unc).p", change)

    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: .*{message}"):
        read_annotation_set(refer_root, "refcoco", "unc")


def test_malformed_instances_file_is_named(refer_root: Path) -> None:
    file = refer_root / "refcoco" / "instances.json"

    edit(file, lambda tree: tree["annotations"][2].update(segmentation=[[1.0, 2.0, 3.0]]))
    with pytest.raises(InputError, match=r"ref_id 2 .*pairs"):
        read_annotation_set(refer_root, "refcoco", "unc")

    edit(file, lambda tree: tree.update(categories=[]))
    with pytest.raises(InputError, match="category_id 1 is not in instances.json"):
        read_annotation_set(refer_root, "refcoco", "unc")

    file.write_text("[]")
    with pytest.raises(InputError, match="instances.json: not a COCO instances file"):
        read_annotation_set(refer_root, "refcoco", "unc")

    file.write_text("{")
    with pytest.raises(InputError, match="instances.json: .*COCO instances file"):
        read_annotation_set(refer_root, "refcoco", "unc")

    file.unlink()
    with pytest.raises(InputError, match="instances.json: no such file"):
        read_annotation_set(refer_root, "refcoco", "unc")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree["annotations"].append(dict(tree["annotations"][3])), "is used twice"),
        (lambda tree: tree["annotations"][-1].update(id=900), "id 900 is used twice"),
        (lambda tree: tree["images"].append(dict(tree["images"][0])), "images.12.: id 9 is used"),
        (lambda tree: tree["categories"].append({"id": 1, "name": "x"}), "categories.3.: id 1 is"),
        (lambda tree: tree["annotations"][2].update(id="x"), "annotations.2.: `id` is 'x'"),
        (lambda tree: tree["annotations"][2].pop("id"), "annotations.2.: no field 'id'"),
        (lambda tree: tree["annotations"][2].update(iscrowd="no"), "`iscrowd` is 'no', neither"),
        (lambda tree: tree["annotations"].append(5), r"annotations.25. is 5, not an object"),
        (lambda tree: tree.update(images={}), "`images` is {}, not a list"),
        (lambda tree: tree["categories"][0].update(name="\ud83d"), "half of a character"),
        (lambda tree: tree["categories"][0].update(name=None), "`name` is None"),
        (lambda tree: tree["images"][0].update(height=0), "ref_id 0 .*height is 0"),
        (lambda tree: tree["images"][0].update(height=10**9), "height is 1000000000, not a number"),
        (lambda tree: tree["images"][0].update(height=48.5), "`height` is 48.5"),
        (lambda tree: tree["images"][0].update(file_name="\ud83d.jpg"), "`file_name`.* half"),
        (lambda tree: tree["images"][0].update(file_name=""), "which names no file"),
        (lambda tree: tree["annotations"][0].pop("segmentation"), "ref_id 0 .*'segmentation'"),
        (lambda tree: tree["annotations"][0].update(segmentation=[]), "segmentation is empty"),
        (lambda tree: tree["annotations"][0].update(segmentation=[[5, 5, 5e8, 5, 9, 9]]), "away"),
        (lambda tree: tree["annotations"][0].update(image_id=25), "on image 25, the ref on 9"),
    ],
)
def test_malformed_record_of_instances_is_named(
    refer_root: Path, change: Callable[[dict], object], message: str
) -> None:
    edit(refer_root / "refcoco" / "instances.json", change)

    with pytest.raises(InputError, match=message) as caught:
        read_annotation_set(refer_root, "refcoco", "unc")
    assert "refcoco/" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [], "images": []}', "the key 'images' twice"),
        ('{"images": [{"id": NaN}]}', "it holds NaN"),
        ('{"images": [{"id": 1e999}], "annotations": [], "categories": []}', "`id` is inf"),
        ("[" * 200_000, "nested too deeply"),
        ('{"images": [' + "9" * 5000 + "]}", "digits"),
        ("\ufeff" + '{"images": 1}', "`annotations` is None, not a list"),
    ],
    ids=["key twice", "NaN", "infinite", "deep", "long number", "byte order mark"],
)
def test_odd_json_is_refused_in_one_line(refer_root: Path, text: str, message: str) -> None:
    (refer_root / "refcoco" / "instances.json").write_text(text, encoding="utf-8")

    with pytest.raises(InputError, match=f"instances.json: .*{message}") as caught:
        read_annotation_set(refer_root, "refcoco", "unc")
    assert len(str(caught.value)) < 600


def bomb() -> list:
    """A list of 262 bytes as a pickle, whose repr has 2 ** 40 entries."""
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "data, message",
    [
        (pickle.dumps([bomb()], protocol=4), "it is not an object with fields"),
        (pickle.dumps([{"ann_id": bomb()}], protocol=4), "`ann_id` is"),
        (pickle.dumps([{"ann_id": 900, "image_id": bomb()}], protocol=4), "`image_id` is"),
        (b"\x80\x04\x8e" + (8 << 30).to_bytes(8, "little") + b"abc.", "not a readable refs file"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "the list of refs is empty"),
        (b"\x80\x02}K\x01" + b"\x85" * 3_000_000 + b"K\x01s.", "which is no text"),
        (b"\x80\x02]" + b"]" * 1_000_000 + b"a" * 1_000_000 + b".", "not an object"),
        (pickle.dumps([{1, 2}], protocol=4), "holds a set"),
        (b"\x80\x02\x82\x01.", "the extension 1"),
        (b"Pabc\n.", "external object 'abc'"),
        (b"I" + b"9" * 5000 + b"\n.", "not a readable refs file"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_pickle_bomb_is_refused_in_one_line(refer_root: Path, data: bytes, message: str) -> None:
    (refer_root / "refcoco" / "refs(unc).p").write_bytes(data)

    with pytest.raises(InputError, match=rf"refs\(unc\)\.p: .*{message}") as caught:
        read_annotation_set(refer_root, "refcoco", "unc")
    assert len(str(caught.value)) < 600


def test_missing_refs_file_lists_the_existing_ones(refer_root: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"neither refs\(umd\)\.p nor refs\(umd\)\.json.*refs\(google\)\.p, refs\(unc\)\.p",
    ):
        read_annotation_set(refer_root, "refcoco", "umd")
    with pytest.raises(InputError, match=r"refcoco\+: no such folder"):
        read_annotation_set(refer_root, "refcoco+", "unc")


def test_pickle_next_to_json_of_the_same_refs_is_refused(refer_root: Path) -> None:
    (refer_root / "refcoco" / "refs(unc).json").write_text("[]")

    with pytest.raises(InputError, match=r"both refs\(unc\)\.p and refs\(unc\)\.json.*remove"):
        read_annotation_set(refer_root, "refcoco", "unc")


# ---------------------------------------------------------------------------------- Real records


def test_real_records_are_read(real_data: Path) -> None:
    root = real_data / "real_records"
    sets = [
        ("refcoco", "unc"),
        ("refcoco", "google"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
    ]

    referrals = []
    for dataset, split_by in sets:
        referrals += read_annotation_set(root, dataset, split_by)[0]
    found, missing = find_images(root, referrals)

    assert len(referrals) == 28
    assert sum(len(ref.sentences) for ref in referrals) == 72
    assert not found
    assert set(missing) == {460986, 495169, 510027, 572949}

    # Photograph 460986 is a leak: it is in train splits and in the val split of another set.
    splits = {(r.dataset, r.split_by, r.split) for r in referrals if r.image_id == 460986}
    train_splits = {
        ("refcoco", "unc", "train"),
        ("refcoco+", "unc", "train"),
        ("refcocog", "umd", "train"),
    }
    assert train_splits < splits
    assert ("refcocog", "google", "val") in splits
