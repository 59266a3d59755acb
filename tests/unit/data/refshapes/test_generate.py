"""Generated folders: the layout of the real sets, and bytes that depend on the parameters alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickletools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coupalign.data import masks
from coupalign.data.packing.refer import read_annotation_set
from coupalign.data.refshapes import generate, scenes
from coupalign.data.refshapes.generate import SPLITS, assign_splits, synth, write_scene
from coupalign.errors import InputError, RunError
from tests.unit.data.refshapes.reader import IMAGES, GeneratedSet


def digests(root: Path) -> dict[str, str]:
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


# ----------------------------------------------------------------------------------------- Files


def test_bytes_depend_on_the_seed_and_not_on_the_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        synth(tmp_path / name, 70, seed=3, workers=workers, progress=False)
    synth(tmp_path / "other", 8, seed=4, workers=1, progress=False)

    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "three")
    first = "images/train2014/COCO_train2014_000000000001.jpg"
    assert one[first] != digests(tmp_path / "other")[first]


def test_layout_is_that_of_refcoco(generated: GeneratedSet) -> None:
    root = generated.root
    assert sorted(path.name for path in root.iterdir()) == ["images", "refcoco"]
    annotation_files = sorted(path.name for path in (root / "refcoco").iterdir())
    assert annotation_files == ["instances.json", "refs(unc).p"]
    assert len(list((root / "images" / "train2014").glob("COCO_train2014_*.jpg"))) == IMAGES

    info = generated.instances["info"]
    assert "RefShapes" in info["description"]
    parameters = {key: info[key] for key in ("seed", "level", "size", "images")}
    assert parameters == {"seed": 7, "level": generated.level, "size": 96, "images": IMAGES}


def test_refs_have_the_fields_of_refcoco(generated: GeneratedSet) -> None:
    fields = {
        "sent_ids",
        "file_name",
        "ann_id",
        "ref_id",
        "image_id",
        "split",
        "sentences",
        "category_id",
    }
    for ref in generated.refs:
        annotation = generated.annotations[ref["ann_id"]]
        assert set(ref) == fields
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]

        texts = [s["sent"] for s in ref["sentences"]]
        assert len(set(texts)) == len(texts) >= 2
        for sentence in ref["sentences"]:
            assert set(sentence) == {"tokens", "raw", "sent", "sent_id"}
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["raw"].lower().strip(" .") == sentence["sent"]

    for key in ("ref_id", "ann_id"):
        assert len({ref[key] for ref in generated.refs}) == len(generated.refs)
    sent_ids = [sent_id for ref in generated.refs for sent_id in ref["sent_ids"]]
    assert sent_ids == list(range(len(sent_ids)))


def test_pickle_has_protocol_2_and_no_globals(generated: GeneratedSet) -> None:
    data = (generated.root / "refcoco" / "refs(unc).p").read_bytes()

    operations = list(pickletools.genops(data))

    first, argument, _ = operations[0]
    assert (first.name, argument) == ("PROTO", 2)
    names = {operation.name for operation, _, _ in operations}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ"}


def test_reader_of_real_sets_reads_it(generated: GeneratedSet) -> None:
    referrals, skipped = read_annotation_set(generated.root, "refcoco", "unc")

    assert len(referrals) == len(generated.refs)
    assert not skipped
    assert {referral.split for referral in referrals} == set(SPLITS)
    objects = Counter(
        (a["image_id"], generated.categories[a["category_id"]])
        for a in generated.annotations.values()
    )
    for referral in referrals:
        others = objects[referral.image_id, referral.category] - 1
        assert referral.same_class == others >= 1


def test_masks_of_the_files_are_the_drawn_masks(tmp_path: Path) -> None:
    objects_in_parts = 0
    for number in range(1, 41):
        rng = np.random.default_rng(np.random.SeedSequence([7, number]))
        drawn = scenes.compose(rng, scenes.LEVELS["hard"], 96, "train").masks
        record = write_scene(tmp_path, number, "train", seed=7, level="hard", size=96)

        for mask, item in zip(drawn, record["objects"]):
            rle = masks.rle_from_segmentation(item["segmentation"], 96, 96)
            assert np.array_equal(masks.decode(rle), mask)
            assert item["area"] == mask.sum() == masks.area(rle)

            ys, xs = np.nonzero(mask)
            x, y, width, height = item["bbox"]
            assert (x, x + width) == (xs.min(), xs.max() + 1)
            assert (y, y + height) == (ys.min(), ys.max() + 1)
            objects_in_parts += len(item["segmentation"]) > 1
    assert objects_in_parts > 3, "occlusion should split some objects into several parts"


def test_larger_pictures_have_larger_objects(tmp_path: Path) -> None:
    record = write_scene(tmp_path, 1, "val", seed=1, level="easy", size=256)

    assert Image.open(next(tmp_path.glob("*.jpg"))).size == (256, 256)
    assert min(item["area"] for item in record["objects"]) > 140 * (256 / 96) ** 2


# ---------------------------------------------------------------------------------------- Splits


def test_splits_share_no_image_and_test_a_has_circles_only(generated: GeneratedSet) -> None:
    images: dict[str, set[int]] = {}
    for ref in generated.refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        if ref["split"].startswith("test"):
            is_circle = generated.categories[ref["category_id"]] == "circle"
            assert is_circle == (ref["split"] == "testA")
    assert sum(map(len, images.values())) == len(set.union(*images.values())) == IMAGES


def test_report_counts_images_and_refs_per_split(generated: GeneratedSet) -> None:
    report = generated.report
    refs = Counter(ref["split"] for ref in generated.refs)
    images = {
        split: len({ref["image_id"] for ref in generated.refs if ref["split"] == split})
        for split in SPLITS
    }

    assert {split: numbers["images"] for split, numbers in report.counts.items()} == images
    assert {split: numbers["refs"] for split, numbers in report.counts.items()} == refs
    assert all(split in report.table() for split in SPLITS)
    json.dumps(report.to_json())


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 10, 100, 6000])
def test_each_split_has_an_image_from_four_images_on(images: int) -> None:
    splits = assign_splits(images)

    assert len(splits) == images
    assert set(splits) <= set(SPLITS)
    assert images < 4 or set(splits) == set(SPLITS)
    if images >= 100:
        assert splits.count("train") == 0.8 * images
        assert splits.count("val") == 0.1 * images


# -------------------------------------------------------------------- Existing folders and errors


def test_finished_set_is_left_as_it_is_and_another_one_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = synth(out, 4, seed=1, workers=1, progress=False)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    again = synth(out, 4, seed=1, workers=2, progress=False)

    assert again.existed
    assert not first.existed
    assert again.counts == first.counts
    assert "already there" in again.table()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(InputError, match="seed is 1, not 2"):
        synth(out, 4, seed=2, progress=False)
    with pytest.raises(InputError, match="level is easy, not hard"):
        synth(out, 4, seed=1, level="hard", progress=False)


def test_foreign_folder_and_file_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "instances.json").write_text('{"info": {"description": "COCO 2014"}}')
    (tmp_path / "file").write_text("mine")

    with pytest.raises(InputError, match="not a RefShapes folder"):
        synth(tmp_path, 4, seed=1, progress=False)
    with pytest.raises(InputError, match="not a RefShapes folder"):
        synth(tmp_path / "file", 4, seed=1, progress=False)

    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "options", [{"images": 0}, {"level": "medium"}, {"size": 20}, {"seed": -1}, {"workers": -1}]
)
def test_argument_out_of_range_is_named(tmp_path: Path, options: dict) -> None:
    name = next(iter(options))

    with pytest.raises(InputError, match=name):
        synth(tmp_path / "set", **{"images": 4, "seed": 1, "progress": False, **options})
    assert not (tmp_path / "set").exists()


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "_write_annotations", fail)

    with pytest.raises(ZeroDivisionError):
        synth(tmp_path / "set", 4, seed=1, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fill)

    with pytest.raises(RunError, match="out: cannot be written: No space left on device; nothing"):
        synth(tmp_path / "out", 4, 0, workers=0, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("coupalign.files.TemporaryFile", refuse)

    with pytest.raises(InputError, match="the data set cannot be written there.*Read-only"):
        synth(tmp_path / "out", 4, 0, workers=0, progress=False)
