"""Photographs that look like photographs, in shard sets of any name, numbering and encoding."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from coupalign.data.index import ShardIndex, read_index
from tests.unit.data.conftest import CATEGORIES, box, change_index, sentences
from tests.unit.data.packing.small_set import pack_quietly, recipe_of

SIZE = (160, 120)


def photograph(seed: int) -> Image.Image:
    """Draw a picture of clouds of all sizes, with some noise."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((SIZE[1], SIZE[0], 3))
    for cells, strength in ((4, 60), (9, 40), (20, 20), (60, 8)):
        coarse = rng.normal(128, 40, (cells * 3 // 4 + 1, cells, 3)).clip(0, 255).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        picture += (np.asarray(smooth, float) - 128) * strength / 40
    return Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, quality: int = 90, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def coco_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


@dataclass(frozen=True)
class Stored:
    """A photograph as a collection stores it."""

    image_id: int
    file_name: str
    data: bytes
    split: str = "train"


def pack_photographs(
    folder: Path, dataset: str, stored: Sequence[Stored], split_by: str = "unc"
) -> ShardIndex:
    """Pack photographs, with one ref each, as the set dataset/split_by."""
    root = folder / "root"
    (root / "images/train2014").mkdir(parents=True)
    (root / dataset).mkdir()
    images, annotations, refs = [], [], []
    for number, photo in enumerate(stored):
        (root / "images/train2014" / photo.file_name).write_bytes(photo.data)
        width, height = Image.open(io.BytesIO(photo.data)).size
        images.append(
            {
                "id": photo.image_id,
                "file_name": photo.file_name,
                "width": width,
                "height": height,
            }
        )
        common = {"image_id": photo.image_id, "category_id": 1}
        polygon = box(2, 2, 5, 5)
        annotations.append(
            {**common, "id": number, "segmentation": [polygon], "iscrowd": 0, "area": 25}
            | {"bbox": [2, 2, 5, 5]}
        )
        refs.append(
            {**common, "ref_id": number, "ann_id": number, "split": photo.split, "file_name": ""}
            | {"sentences": sentences(number, f"thing {number}"), "sent_ids": [number]}
        )

    instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / dataset / "instances.json").write_text(json.dumps(instances))
    (root / dataset / f"refs({split_by}).json").write_text(json.dumps(refs))
    recipe = recipe_of(
        root, sets=({"dataset": dataset, "split_by": split_by},), vocabulary_size=None
    )
    pack_quietly(recipe, folder / "shards")
    return read_index(folder / "shards")


def forget_hashes(folder: Path) -> ShardIndex:
    """Make the index of `pack_photographs` one of an early version."""

    def forget(tree: dict) -> None:
        for image in tree["images"]:
            del image["photo"]

    change_index(folder / "shards", forget)
    return read_index(folder / "shards")
