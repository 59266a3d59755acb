"""Packing: the same bytes always, nothing half done, and errors before anything is written."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import random
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from coupalign.data.index import read_index
from coupalign.data.packing import vocabulary
from coupalign.data.packing.recipe import Recipe
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError
from tests.unit.data.packing.small_set import SETS, contents, image_path, pack_quietly, recipe_of

# -------------------------------------------------------------------------------- The same bytes


def test_bytes_do_not_depend_on_workers_or_on_the_order_of_refs(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    refs_file = refer_root / "refcoco" / "refs(unc).p"
    refs = pickle.loads(refs_file.read_bytes())
    random.Random(1).shuffle(refs)
    refs_file.write_bytes(pickle.dumps(refs, protocol=0))
    instances_file = refer_root / "refcoco" / "instances.json"
    tree = json.loads(instances_file.read_text())
    instances_file.write_text(json.dumps({key: rows[::-1] for key, rows in tree.items()}))
    moved = recipe_of(refer_root.rename(tmp_path / "moved"), sets=SETS[::-1])

    report = pack_quietly(moved, tmp_path / "three", workers=3)

    assert report.state == "packed"
    assert (report.shards, report.images) == (3, 12)
    assert contents(tmp_path / "three") == contents(packed)


def test_vocabulary_is_trained_on_the_cleaned_training_sentences(
    refer_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    train_vocabulary = vocabulary.train_vocabulary

    def spy(sentences, path, size=8000) -> None:
        seen.append(sorted(sentences))
        train_vocabulary(seen[-1], path, size)

    monkeypatch.setattr(vocabulary, "train_vocabulary", spy)

    pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "with_train")
    assert len(seen[0]) == 41
    assert "red box at the café – left" in seen[0]
    assert not any("." in sentence for sentence in seen[0])

    # Without a train split, all sentences are used.
    for file in refer_root.glob("refcoco*/refs*"):
        file.write_bytes(file.read_bytes().replace(b"train", b"other"))
    pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "without_train")
    assert len(seen[1]) == 61

    pack_quietly(recipe_of(refer_root, vocabulary_size=None), tmp_path / "no_vocabulary")
    assert read_index(tmp_path / "no_vocabulary").vocabulary is None
    assert not (tmp_path / "no_vocabulary/vocab.txt").exists()
    assert len(seen) == 2


# --------------------------------------------------------------------------- Killed and restarted


def pack_until_call(number: int, recipe: Recipe, out: Path, overwrite: bool = False) -> bool:
    """Pack in a fork that kills itself at its n-th call that changes or flushes a file.

    Returns whether it was killed; it is not if it makes fewer calls than that.
    """
    child = os.fork()
    if child == 0:
        calls_left = number

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls_left
                calls_left -= 1
                if calls_left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        try:
            for name in ("replace", "fsync", "mkdir", "unlink"):
                setattr(os, name, deadly(getattr(os, name)))
            pack_quietly(recipe, out, overwrite=overwrite)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("older", [False, True], ids=["fresh", "over an older set"])
def test_killed_at_any_moment_a_restart_gives_the_same_bytes(
    refer_root: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    importlib.import_module("webdataset")  # once, so that the forks need not
    recipe, expected = recipe_of(refer_root), contents(packed)
    other = tmp_path / "other"
    if older:
        smaller = {"sets": SETS[:1], "max_images": 3, "vocabulary_size": None}
        pack_quietly(recipe_of(refer_root, **smaller), other)
    # The disk keeps what a killed process wrote, so flushing it would only take time.
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    number, killed = 0, True
    while killed:
        out = tmp_path / f"out{number}"
        if older:
            shutil.copytree(other, out)
        killed = pack_until_call(number, recipe, out, overwrite=older)

        # An index is always that of a whole set; a receipt is always that of a finished shard.
        if (out / "index.json").exists():
            assert verify(out).ok
        elif out.exists():
            for receipt in out.glob(".shard-*.tar.json"):
                url = json.loads(receipt.read_text())["shard"]["url"]
                assert (out / url).read_bytes() == expected[url]

        report = pack_quietly(recipe, out, overwrite=older)
        assert contents(out) == expected, (
            f"after a kill at call {number}: {sorted(contents(out))}, {report}"
        )
        shutil.rmtree(out)
        number += 1
    assert number > 20


def test_restart_keeps_finished_shards_and_rewrites_doubtful_ones(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    # Given a run that was killed after two shards, one of them damaged since …
    recipe, out = recipe_of(refer_root), tmp_path / "out"
    calls = 0
    while not (out / ".shard-000001.tar.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        assert pack_until_call(calls, recipe, out)
        calls += 1
    stamps = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    (out / "shard-000001.tar").write_bytes(b"damaged")

    # … with debris of other runs and a file of the user …
    (out / ".shard-000007.tar.json").write_text("{}")
    (out / ".shard-000002.tar.4711.partial").write_text("half")
    (out / "notes.txt").write_text("mine")

    report = pack_quietly(recipe, out)

    assert report.reused == 1
    assert (out / "shard-000000.tar").stat().st_mtime_ns == stamps["shard-000000.tar"]
    assert contents(out) == {**contents(packed), "notes.txt": b"mine"}


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other JSON", "deep"])
def test_damaged_receipt_proves_nothing(
    refer_root: Path, packed: Path, tmp_path: Path, damage: str
) -> None:
    recipe, out = recipe_of(refer_root), tmp_path / "out"
    calls = 0
    while not (out / ".shard-000000.tar.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        assert pack_until_call(calls, recipe, out)
        calls += 1

    receipt = out / ".shard-000000.tar.json"
    text = receipt.read_text()
    offset = text.index('"jpg": [') + text[text.index('"jpg": [') :].index("512")
    changed = {
        "cut": text[:100],
        "empty": "",
        "bit": text[:offset] + "513" + text[offset + 3 :],
        "other JSON": "[1]",
        "deep": "[" * 100_000,
    }
    receipt.write_text(changed[damage])
    report = pack_quietly(recipe, out)

    assert report.reused == 0
    assert contents(out) == contents(packed)


# ------------------------------------------------------------------------------------ Bad sources


def test_missing_images_are_listed_before_anything_is_written(
    refer_root: Path, tmp_path: Path
) -> None:
    removed = (9, 25, 72, 138, 309, 326, 575)
    for image_id in removed:
        image_path(refer_root, image_id).unlink()

    with pytest.raises(InputError) as caught:
        pack_quietly(recipe_of(refer_root), tmp_path / "out")

    message = str(caught.value)
    assert "7 of 12 images are missing (18 refs need them)" in message
    assert "missing: skip" in message
    listed = [f"{image_id:012d}" in message for image_id in removed]
    assert listed == [True] * 5 + [False] * 2
    assert not (tmp_path / "out").exists()


def test_missing_images_can_be_skipped(refer_root: Path, tmp_path: Path) -> None:
    for image_id in (9, 25, 72, 138, 309, 326, 575):
        image_path(refer_root, image_id).unlink()

    report = pack_quietly(recipe_of(refer_root, missing="skip"), tmp_path / "out")

    assert report.images == 5
    assert len(report.missing_images) == 7
    assert "7 of 12" in report.table()
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out").counts == report.counts

    shutil.rmtree(refer_root / "images")
    with pytest.raises(InputError, match="nothing to pack"):
        pack_quietly(recipe_of(refer_root, missing="skip"), tmp_path / "empty")


def test_missing_annotation_is_refused_or_skipped(refer_root: Path, tmp_path: Path) -> None:
    for file in refer_root.glob("*/instances.json"):
        tree = json.loads(file.read_text())
        tree["annotations"] = [a for a in tree["annotations"] if a["id"] != 41510]
        file.write_text(json.dumps(tree))

    with pytest.raises(InputError, match="ref_id 5 .*ann_id 41510"):
        pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    report = pack_quietly(recipe_of(refer_root, sets=SETS[:1], missing="skip"), tmp_path / "out")
    assert len(report.missing_annotations) == 1
    assert "1 refs are left out" in report.table()
    assert report.counts["refcoco/unc"]["train"]["refs"] == 15


def test_sizes_that_disagree_are_refused(refer_root: Path, tmp_path: Path) -> None:
    file = refer_root / "refcocog/instances.json"
    tree = json.loads(file.read_text())
    tree["images"][0]["width"] += 1
    file.write_text(json.dumps(tree))

    # Two instances.json files disagree, or one disagrees with the photograph.
    with pytest.raises(InputError, match="image_id 9 different sizes"):
        pack_quietly(recipe_of(refer_root), tmp_path / "out")
    with pytest.raises(InputError, match="the picture is 64 x 48, but .* for 65 x 48"):
        pack_quietly(recipe_of(refer_root, sets=SETS[1:]), tmp_path / "out")


def test_report_warns_of_counts_that_are_not_the_published_ones(
    refer_root: Path, tmp_path: Path
) -> None:
    report = pack_quietly(recipe_of(refer_root), tmp_path / "out")

    counted = "refcoco/unc train: 8 images, 16 refs, 41 sentences"
    published = "16,994 / 42,404 / 120,624"
    assert f"warning: {counted}; published: {published}" in report.table()
    value = json.loads(json.dumps(report.to_json()))
    assert value["counts"]["refcoco/unc"]["testA"] == {"images": 1, "refs": 2, "sentences": 6}
    assert value["state"] == "packed"
    assert value["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.tar"))


# ----------------------------------------------------------------------------- EXIF orientation


def test_photographs_with_an_exif_orientation_are_named_with_what_was_done(
    refer_root: Path, tmp_path: Path
) -> None:
    # The photographs are 64 x 48. Orientation 3 keeps that size, 6 does not.
    for image_id, orientation in ((9, 3), (72, 6)):
        path = image_path(refer_root, image_id)
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = orientation
            image.save(path, exif=exif)

    report = pack_quietly(recipe_of(refer_root), tmp_path / "out", workers=2)

    [turned, kept] = [warning for warning in report.warnings if "EXIF orientation" in warning]
    assert "1 were turned as a viewer shows them" in turned
    assert "(COCO_train2014_000000000009.jpg)" in turned
    assert "1 stay as stored" in kept
    assert "(COCO_train2014_000000000072.jpg)" in kept
    assert verify(tmp_path / "out").ok


def test_copies_of_a_photograph_are_named(refer_root: Path, tmp_path: Path) -> None:
    shutil.copy(image_path(refer_root, 9), image_path(refer_root, 138))

    report = pack_quietly(recipe_of(refer_root), tmp_path / "out")

    [warning] = [warning for warning in report.warnings if "several image ids" in warning]
    assert warning.startswith("1 photographs are packed") and warning.endswith("[9, 138]")
