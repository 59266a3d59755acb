"""RefShapes: the layout of the real sets, bytes that depend on the seed alone, and sentences that can mean one object only."""

from __future__ import annotations

import hashlib
import json
import pickle
import pickletools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coupalign.data import masks
from coupalign.data.packing import refer
from coupalign.data.refshapes import drawing as shapes
from coupalign.data.refshapes import generate as synthetic
from coupalign.data.refshapes import scenes
from coupalign.data.refshapes.generate import synth
from coupalign.data.refshapes.phrases import Phrase, Scene
from coupalign.data.transforms import mirror_sentence
from coupalign.errors import InputError

IMAGES = 150
HUES = {"red": 0, "orange": 28, "yellow": 55, "green": 132, "blue": 225, "purple": 283}


class Made:
    """A generated folder and its files, read plainly."""

    def __init__(self, root: Path, level: str, images: int = IMAGES, **options: Any) -> None:
        self.root, self.level = root / level, level
        self.report = synth(self.root, images, seed=7, level=level, progress=False, **options)
        self.instances = json.loads((self.root / "refcoco" / "instances.json").read_text())
        self.refs = pickle.loads((self.root / "refcoco" / "refs(unc).p").read_bytes())
        self.annotations = {a["id"]: a for a in self.instances["annotations"]}
        self.categories = {c["id"]: c["name"] for c in self.instances["categories"]}

    def picture(self, image_id: int) -> Image.Image:
        return Image.open(
            self.root / "images" / "train2014" / f"COCO_train2014_{image_id:012d}.jpg"
        )

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """What a reader of the files knows of the objects, found without the generator: from category, polygons and pixels."""
        picture = self.picture(image_id)
        hues = (
            None
            if picture.mode == "L"
            else np.asarray(picture.convert("HSV"))[..., 0].astype(float) * 360 / 255
        )
        here = [a for a in self.annotations.values() if a["image_id"] == image_id]
        return [
            _describe(a, self.categories[a["category_id"]], hues, picture.size[0], self.level)
            for a in here
        ]


@pytest.fixture(scope="module", params=["easy", "hard"])
def made(request, tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("refshapes"), request.param, workers=0)


# ------------------------------------------------------------------------------------------- the oracle for sentences


def _describe(
    annotation: dict, noun: str, hues: np.ndarray | None, side: int, level: str
) -> dict[str, Any]:
    mask = masks.decode(masks.rle_from_segmentation(annotation["segmentation"], side, side))
    ys, xs = np.nonzero(mask)
    color = None
    if hues is not None:
        angle = np.angle(np.exp(1j * np.radians(hues[mask])).mean(), deg=True)
        color = min(HUES, key=lambda name: abs((angle - HUES[name] + 180) % 360 - 180))
    return {
        "id": annotation["id"],
        "noun": noun,
        "color": color,
        "big": mask.sum() > (508 if level == "easy" else 185) * (side / 96) ** 2,
        "x": (xs.mean() + 0.5) / side,
        "y": (ys.mean() + 0.5) / side,
    }


def _candidates(words: list[str], objects: list[dict]) -> list[dict]:
    """Objects that fit a noun phrase such as `little red star`."""
    for word in words:
        if word in HUES:
            objects = [o for o in objects if o["color"] == word]
        elif word in ("small", "little", "big", "large"):
            objects = [o for o in objects if o["big"] == (word in ("big", "large"))]
        elif word not in ("one", "thing", "shape", "that", "is"):
            assert word in shapes.SHAPES, f"unknown word {word!r}"
            objects = [o for o in objects if o["noun"] == word]
    return objects


def _reading(sentence: str, objects: list[dict], generous: bool) -> list[int]:
    """Ids of the objects a sentence may mean, for a strict or a generous reader. Knows nothing of the generator."""
    words = [word for word in sentence.replace("to the", "").split() if word != "the"]
    for relation, axis, sign in (
        ("left of", "x", 1),
        ("right of", "x", -1),
        ("above", "y", 1),
        ("below", "y", -1),
    ):
        if f" {relation} " in (text := " ".join(words)):
            noun, mark = text.split(f" {relation} ")
            landmarks = _candidates(mark.split(), objects)
            assert len(landmarks) == 1, f"{sentence}: {len(landmarks)} landmarks"
            other = "y" if axis == "x" else "x"
            ahead = {o["id"]: sign * (landmarks[0][axis] - o[axis]) for o in objects}
            aside = {o["id"]: abs(landmarks[0][other] - o[other]) for o in objects}
            fits = [o["id"] for o in _candidates(noun.split(), objects) if o is not landmarks[0]]
            return [
                i
                for i in fits
                if (ahead[i] > 0.025 if generous else ahead[i] > 0.1 and aside[i] < ahead[i])
            ]
    if "from" in words:
        rank, side = ("first", "second", "third").index(words[0]), words[-1]
        axis = "x" if side in ("left", "right") else "y"
        group = sorted(
            _candidates(words[1:-2], objects),
            key=lambda o: o[axis],
            reverse=side in ("right", "bottom"),
        )
        place = group[rank][axis]
        return [o["id"] for o in group if abs(o[axis] - place) < (0.08 if generous else 1e-9)]
    places = [word for word in words if word in ("left", "right", "top", "bottom")]
    fits = _candidates(
        [word for word in words if word not in (*places, "on", "at", "side")], objects
    )
    edge = 0.52 if generous else 0.45
    for place in places:
        axis = "x" if place in ("left", "right") else "y"
        fits = [o for o in fits if (o[axis] if place in ("left", "top") else 1 - o[axis]) < edge]
    return [o["id"] for o in fits]


def test_every_sentence_means_its_object_alone_for_strict_and_generous_readers(made: Made) -> None:
    cache: dict[int, list[dict]] = {}
    for ref in made.refs:
        objects = cache.setdefault(ref["image_id"], made.objects(ref["image_id"]))
        mirrored = [{**o, "x": 1 - o["x"]} for o in objects]
        for sentence in ref["sentences"]:
            text = sentence["sent"]
            for generous in (False, True):
                assert _reading(text, objects, generous) == [ref["ann_id"]], (
                    ref["image_id"],
                    text,
                    generous,
                )
                assert _reading(mirror_sentence(text), mirrored, generous) == [ref["ann_id"]], (
                    ref["image_id"],
                    text,
                    "mirrored",
                )


def test_a_place_also_holds_relative_to_the_group(made: Made) -> None:
    """`circle on the left` lies in the left half, and is the leftmost circle as well."""
    seen = 0
    for ref in made.refs:
        objects = made.objects(ref["image_id"])
        for sentence in ref["sentences"]:
            words = [word for word in sentence["tokens"] if word not in ("the", "on", "at", "side")]
            places = [word for word in words if word in ("left", "right", "top", "bottom")]
            if len(places) != 1 or {"of", "from"} & set(words):
                continue
            group = _candidates([word for word in words if word != places[0]], objects)
            group.sort(key=lambda o: o["x" if places[0] in ("left", "right") else "y"])
            assert group[0 if places[0] in ("left", "top") else -1]["id"] == ref["ann_id"], (
                sentence["sent"]
            )
            seen += 1
    assert seen > 30


def test_gray_pictures_have_no_color_words(made: Made) -> None:
    gray = {i["id"] for i in made.instances["images"] if made.picture(i["id"]).mode == "L"}
    assert 0 < len(gray) < 0.15 * IMAGES
    for ref in made.refs:
        if ref["image_id"] in gray:
            assert not any(set(s["tokens"]) & set(HUES) for s in ref["sentences"])


# ------------------------------------------------------------------------------------------------- scenes and masks


def test_targets_are_never_alone_in_their_class_and_stay_visible(made: Made) -> None:
    classes = Counter((a["image_id"], a["category_id"]) for a in made.annotations.values())
    for ref in made.refs:
        assert classes[ref["image_id"], ref["category_id"]] >= 2
    per_image = Counter(a["image_id"] for a in made.annotations.values())
    assert set(per_image.values()) <= ({3, 4} if made.level == "easy" else {5, 6, 7, 8, 9})
    assert min(a["area"] for a in made.annotations.values()) >= (
        140 if made.level == "easy" else 60
    )


def test_levels_differ_in_language(made: Made) -> None:
    sentences = [s["tokens"] for ref in made.refs for s in ref["sentences"]]
    related = np.mean([bool({"above", "below", "of"} & set(s)) for s in sentences])
    counted = np.mean(["from" in s for s in sentences])
    if made.level == "easy":
        assert related == counted == 0
        assert max(map(len, sentences)) <= 8
        assert np.mean([bool(set(HUES) & set(s)) for s in sentences]) > 0.4
    else:
        assert related > 0.25 and counted > 0.15
        assert max(map(len, sentences)) <= 14


def test_masks_of_the_files_are_the_drawn_masks(tmp_path: Path) -> None:
    parts = 0
    for number in range(1, 41):
        drawn = scenes.compose(
            np.random.default_rng(np.random.SeedSequence([7, number])),
            scenes.LEVELS["hard"],
            96,
            "train",
        )[1]
        record = synthetic.write_scene(tmp_path, 7, "hard", 96, (number, "train"))
        for mask, thing in zip(drawn, record["objects"]):
            rle = masks.rle_from_segmentation(thing["segmentation"], 96, 96)
            assert np.array_equal(masks.decode(rle), mask)
            assert thing["area"] == mask.sum() == masks.area(rle)
            ys, xs = np.nonzero(mask)
            assert thing["bbox"] == [
                xs.min(),
                ys.min(),
                xs.max() + 1 - xs.min(),
                ys.max() + 1 - ys.min(),
            ]
            parts += len(thing["segmentation"]) > 1
    assert parts > 3, "occlusion should leave some objects in several parts"


def test_trace_gives_any_mask_back_exactly() -> None:
    """Ragged sizes, holes, corners that touch; against pycocotools and an even-odd count at pixel centers."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = (int(n) for n in rng.integers(1, 14, 2))
        mask = rng.random((height, width)) < rng.choice((0.1, 0.3, 0.6, 0.9, 1.0))
        polygons = shapes.trace(mask)
        inside = np.zeros(mask.shape, int)
        for polygon in polygons:
            corners = list(zip(polygon[::2], polygon[1::2]))
            for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
                if x0 == x1:
                    inside[min(y0, y1) : max(y0, y1), x0:] += 1
        assert np.array_equal(inside % 2 == 1, mask)
        if mask.any():
            assert np.array_equal(
                masks.decode(masks.rle_from_segmentation(polygons, height, width)), mask
            )
        else:
            assert polygons == []


def test_the_picture_agrees_with_the_mask() -> None:
    """Pixels well inside a mask have the object's paint, to within light, noise and the rim."""
    rng = np.random.default_rng(3)
    thing = shapes.Thing("circle", "red", "big", 40, 50, 18, 0, (221, 38, 42))
    labels = shapes.label_map([thing], [], [], 96)
    mask = shapes.visible_masks(labels, 1)[0]
    assert mask.sum() == pytest.approx(shapes.full_area(thing), rel=0.02)
    picture = np.asarray(
        shapes.colorize(labels, [thing], [], np.full((96, 96, 3), 128, np.float32), rng), float
    )
    y, x = np.mgrid[:96, :96] + 0.5
    core = np.hypot(x - 40, y - 50) < 16
    assert np.abs(picture[core].mean(0) - thing.paint).max() < 20
    assert np.abs(picture[~mask & (np.hypot(x - 40, y - 50) > 20)].mean(0) - 128).max() < 10


# --------------------------------------------------------------------------------------------------------- phrases


def _thing(
    shape: str, x: float, y: float = 50, color: str = "red", size: str = "big"
) -> shapes.Thing:
    return shapes.Thing(shape, color, size, x, y, 10, 0, (0, 0, 0))


def test_a_near_miss_makes_a_place_ambiguous() -> None:
    left = Phrase("circle", places=("left",))
    assert Scene([_thing("circle", 20), _thing("circle", 80)], 100).refers(left) == 0
    assert Scene([_thing("circle", 20), _thing("circle", 48)], 100).refers(left) is None
    assert Scene([_thing("circle", 20), _thing("square", 48)], 100).refers(left) == 0
    assert Scene([_thing("circle", 20), _thing("circle", 30)], 100).refers(left) is None
    assert Scene([_thing("circle", 70)], 100).refers(left) is None


def test_order_needs_gaps_and_relations_a_clear_landmark() -> None:
    row = [_thing("circle", x) for x in (10, 30, 60, 90)]
    assert Scene(row, 100).refers(Phrase("circle", order=(1, "right"))) == 2
    assert (
        Scene([*row[:3], _thing("circle", 65)], 100).refers(Phrase("circle", order=(1, "right")))
        is None
    )
    pair = [_thing("star", 20), _thing("star", 80), _thing("square", 50)]
    of_square = Phrase("star", relation=("left of", Phrase("square")))
    assert Scene(pair, 100).refers(of_square) == 0
    assert Scene([*pair, _thing("square", 90)], 100).refers(of_square) is None
    assert (
        Scene([_thing("star", 20), _thing("star", 45), _thing("square", 50)], 100).refers(of_square)
        is None
    )


# ----------------------------------------------------------------------------------------------------------- files


def _digest(root: Path) -> dict[str, str]:
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(root.rglob("*"))
        if f.is_file()
    }


def test_same_seed_same_bytes_for_any_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        synth(tmp_path / name, 70, seed=3, workers=workers, progress=False)
    assert _digest(tmp_path / "one") == _digest(tmp_path / "three")
    synth(tmp_path / "other", 8, seed=4, workers=1, progress=False)
    name = "images/train2014/COCO_train2014_000000000001.jpg"
    assert _digest(tmp_path / "one")[name] != _digest(tmp_path / "other")[name]


def test_layout_is_that_of_refcoco(made: Made) -> None:
    assert sorted(p.name for p in made.root.iterdir()) == ["images", "refcoco"]
    assert sorted(p.name for p in (made.root / "refcoco").iterdir()) == [
        "instances.json",
        "refs(unc).p",
    ]
    assert len(list((made.root / "images" / "train2014").glob("COCO_train2014_*.jpg"))) == IMAGES
    assert "RefShapes" in made.instances["info"]["description"]
    assert {key: made.instances["info"][key] for key in ("seed", "level", "size", "images")} == {
        "seed": 7,
        "level": made.level,
        "size": 96,
        "images": IMAGES,
    }
    keys = {
        "sent_ids",
        "file_name",
        "ann_id",
        "ref_id",
        "image_id",
        "split",
        "sentences",
        "category_id",
    }
    for ref in made.refs:
        assert set(ref) == keys
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        assert made.annotations[ref["ann_id"]]["image_id"] == ref["image_id"]
        assert made.annotations[ref["ann_id"]]["category_id"] == ref["category_id"]
        texts = [s["sent"] for s in ref["sentences"]]
        assert len(set(texts)) == len(texts) >= 2
        for sentence in ref["sentences"]:
            assert set(sentence) == {"tokens", "raw", "sent", "sent_id"}
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["raw"].lower().strip(" .") == sentence["sent"]
    for key in ("ref_id", "ann_id"):
        assert len({ref[key] for ref in made.refs}) == len(made.refs)
    sent_ids = [sent_id for ref in made.refs for sent_id in ref["sent_ids"]]
    assert sent_ids == list(range(len(sent_ids)))


def test_the_pickle_has_protocol_2_and_no_globals(made: Made) -> None:
    operations = list(pickletools.genops((made.root / "refcoco" / "refs(unc).p").read_bytes()))
    assert operations[0][0].name == "PROTO" and operations[0][1] == 2
    assert not {op.name for op, _, _ in operations} & {
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "INST",
        "OBJ",
        "NEWOBJ",
    }


def test_the_reader_of_real_sets_reads_it(made: Made) -> None:
    referrals, missing = refer.read_annotation_set(made.root, "refcoco", "unc")
    assert len(referrals) == len(made.refs) and not missing
    assert {r.split for r in referrals} == set(synthetic.SPLITS)
    for referral in referrals:
        classes = [
            made.categories[a["category_id"]]
            for a in made.annotations.values()
            if a["image_id"] == referral.image_id
        ]
        assert referral.same_class == classes.count(referral.category) - 1 >= 1, (
            "all objects of a scene are in instances.json"
        )


def test_splits_and_what_test_a_and_b_mean(made: Made) -> None:
    images: dict[str, set[int]] = {}
    for ref in made.refs:
        images.setdefault(ref["split"], set()).add(ref["image_id"])
        if ref["split"].startswith("test"):
            assert (made.categories[ref["category_id"]] == "circle") == (ref["split"] == "testA")
    assert sum(map(len, images.values())) == len(set.union(*images.values())) == IMAGES
    assert {split: c["images"] for split, c in made.report.counts.items()} == {
        s: len(i) for s, i in images.items()
    }
    assert {split: c["refs"] for split, c in made.report.counts.items()} == Counter(
        r["split"] for r in made.refs
    )
    assert all(split in made.report.table() for split in synthetic.SPLITS)
    json.dumps(made.report.to_json())


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 10, 100, 6000])
def test_every_split_has_an_image_from_four_on(images: int) -> None:
    splits = synthetic.assign_splits(images)
    assert len(splits) == images and set(splits) <= set(synthetic.SPLITS)
    assert images < 4 or set(splits) == set(synthetic.SPLITS)
    if images >= 100:
        assert splits.count("train") == 0.8 * images and splits.count("val") == 0.1 * images


def test_again_is_a_no_op_and_other_parameters_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = synth(out, 4, seed=1, workers=1, progress=False)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = synth(out, 4, seed=1, workers=2, progress=False)
    assert (
        again.existed
        and not first.existed
        and again.counts == first.counts
        and "already there" in again.table()
    )
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    with pytest.raises(InputError, match="seed 1 there, 2 asked for"):
        synth(out, 4, seed=2, progress=False)
    with pytest.raises(InputError, match="level easy there, hard asked for"):
        synth(out, 4, seed=1, level="hard", progress=False)


def test_a_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "instances.json").write_text('{"info": {"description": "COCO 2014"}}')
    with pytest.raises(InputError, match="not a RefShapes folder"):
        synth(tmp_path, 4, seed=1, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a RefShapes folder"):
        synth(tmp_path / "file", 4, seed=1, progress=False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "options", [{"images": 0}, {"level": "medium"}, {"size": 20}, {"seed": -1}, {"workers": -1}]
)
def test_arguments_out_of_range_are_named(tmp_path: Path, options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        synth(tmp_path / "set", **{"images": 4, "seed": 1, "progress": False, **options})
    assert not (tmp_path / "set").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_write_annotations", full)
    with pytest.raises(OSError, match="No space"):
        synth(tmp_path / "set", 4, seed=1, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_other_sizes_scale(tmp_path: Path) -> None:
    record = synthetic.write_scene(tmp_path, 1, "easy", 256, (1, "val"))
    assert Image.open(next(tmp_path.glob("*.jpg"))).size == (256, 256)
    assert min(thing["area"] for thing in record["objects"]) > 140 * (256 / 96) ** 2
