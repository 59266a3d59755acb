"""Read a generated RefShapes folder and its sentences, knowing nothing of the generator."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coupalign.data import masks
from coupalign.data.refshapes.drawing import SHAPES
from coupalign.data.refshapes.generate import synth

IMAGES = 150
HUES = {"red": 0, "orange": 28, "yellow": 55, "green": 132, "blue": 225, "purple": 283}
SIDES = ("left", "right", "top", "bottom")
RELATIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
ORDINALS = ("first", "second", "third")
SMALL_UP_TO = {"easy": 508, "hard": 185}  # pixels, in a picture of 96 x 96


@dataclass(frozen=True, kw_only=True)
class SeenObject:
    """What a reader of the files can see of an object."""

    ann_id: int
    noun: str
    color: str | None
    big: bool
    x: float  # of the center, as a share of the side
    y: float


class GeneratedSet:
    """A generated folder and its files."""

    def __init__(self, root: Path, level: str, images: int = IMAGES, **options: Any) -> None:
        self.root, self.level = root / level, level
        self.report = synth(self.root, images, seed=7, level=level, progress=False, **options)
        self.instances = json.loads((self.root / "refcoco" / "instances.json").read_text())
        self.refs = pickle.loads((self.root / "refcoco" / "refs(unc).p").read_bytes())
        self.annotations = {a["id"]: a for a in self.instances["annotations"]}
        self.categories = {c["id"]: c["name"] for c in self.instances["categories"]}

    def picture(self, image_id: int) -> Image.Image:
        folder = self.root / "images" / "train2014"
        return Image.open(folder / f"COCO_train2014_{image_id:012d}.jpg")

    def objects(self, image_id: int) -> list[SeenObject]:
        """Recognize the objects of a picture from category, polygons and pixels."""
        picture = self.picture(image_id)
        hues = None
        if picture.mode != "L":
            hues = np.asarray(picture.convert("HSV"))[..., 0].astype(float) * 360 / 255
        return [
            self._recognize(annotation, hues, picture.size[0])
            for annotation in self.annotations.values()
            if annotation["image_id"] == image_id
        ]

    def _recognize(self, annotation: dict, hues: np.ndarray | None, side: int) -> SeenObject:
        mask = masks.decode(masks.rle_from_segmentation(annotation["segmentation"], side, side))
        ys, xs = np.nonzero(mask)
        return SeenObject(
            ann_id=annotation["id"],
            noun=self.categories[annotation["category_id"]],
            color=None if hues is None else nearest_color(hues[mask]),
            big=mask.sum() > SMALL_UP_TO[self.level] * (side / 96) ** 2,
            x=(xs.mean() + 0.5) / side,
            y=(ys.mean() + 0.5) / side,
        )


def nearest_color(hues: np.ndarray) -> str:
    """Return the color word whose hue is nearest to the mean of `hues`, in degrees."""
    mean = np.angle(np.exp(1j * np.radians(hues)).mean(), deg=True)

    def distance(name: str) -> float:
        return abs((mean - HUES[name] + 180) % 360 - 180)

    return min(HUES, key=distance)


def fitting_objects(words: list[str], objects: list[SeenObject]) -> list[SeenObject]:
    """Return the objects that fit a noun phrase such as `little red star`."""
    for word in words:
        if word in HUES:
            objects = [o for o in objects if o.color == word]
        elif word in ("small", "little", "big", "large"):
            objects = [o for o in objects if o.big == (word in ("big", "large"))]
        elif word not in ("one", "thing", "shape", "that", "is"):
            assert word in SHAPES, f"unknown word {word!r}"
            objects = [o for o in objects if o.noun == word]
    return objects


def read_sentence(sentence: str, objects: list[SeenObject], generous: bool) -> list[int]:
    """Return the ann_ids of the objects that a sentence may mean.

    Args:
        generous: read like someone who accepts every object that could be meant, instead of only
            those that are clearly meant.
    """
    words = [word for word in sentence.replace("to the", "").split() if word != "the"]
    for relation in RELATIONS:
        if f" {relation} " in " ".join(words):
            return _read_relation(words, relation, objects, generous=generous)
    if "from" in words:
        return _read_order(words, objects, generous)
    return _read_sides(words, objects, generous)


def _read_relation(
    words: list[str], relation: str, objects: list[SeenObject], *, generous: bool
) -> list[int]:
    axis, sign = RELATIONS[relation]
    other_axis = "y" if axis == "x" else "x"
    noun, landmark_noun = " ".join(words).split(f" {relation} ")
    landmarks = fitting_objects(landmark_noun.split(), objects)
    assert len(landmarks) == 1, f"{words}: {len(landmarks)} landmarks"
    landmark = landmarks[0]

    meant = []
    for item in fitting_objects(noun.split(), objects):
        if item is landmark:
            continue
        ahead = sign * (getattr(landmark, axis) - getattr(item, axis))
        aside = abs(getattr(landmark, other_axis) - getattr(item, other_axis))
        if ahead > 0.025 if generous else ahead > 0.1 and aside < ahead:
            meant.append(item.ann_id)
    return meant


def _read_order(words: list[str], objects: list[SeenObject], generous: bool) -> list[int]:
    ordinal, *noun, _, side = words  # "second small star from left"
    axis = "x" if side in ("left", "right") else "y"
    group = sorted(
        fitting_objects(noun, objects),
        key=lambda o: getattr(o, axis),
        reverse=side in ("right", "bottom"),
    )

    position = getattr(group[ORDINALS.index(ordinal)], axis)
    tolerance = 0.08 if generous else 1e-9
    return [o.ann_id for o in group if abs(getattr(o, axis) - position) < tolerance]


def _read_sides(words: list[str], objects: list[SeenObject], generous: bool) -> list[int]:
    noun = [word for word in words if word not in (*SIDES, "on", "at", "side")]
    meant = fitting_objects(noun, objects)
    limit = 0.52 if generous else 0.45
    for side in SIDES:
        if side in words:
            meant = [o for o in meant if distance_from(side, o) < limit]
    return [o.ann_id for o in meant]


def distance_from(side: str, item: SeenObject) -> float:
    """Return the distance of an object from a side of the picture, as a share of the side."""
    position = item.x if side in ("left", "right") else item.y
    return position if side in ("left", "top") else 1 - position
