"""A small data set in the `refer` layout, with everything in it that real files surprise one with, and its packed form."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 16, "name": "bird"}, {"id": 44, "name": "bottle"}]
COLORS = {
    "red": (210, 40, 40),
    "blue": (40, 60, 210),
    "green": (40, 170, 60),
    "yellow": (220, 210, 50),
}
SPLITS = ["train"] * 8 + ["val", "val", "testA", "testB"]  # one an image
IMAGE_IDS = [9, 25, 72, 138, 309, 326, 575, 625, 40961, 106499, 353072, 573854]
GRAY_IMAGE = 25
CROWD_ANNOTATION = 900100000138
OVERLAPPING_ANNOTATION = 41510
ACCENTED = "red box at the café – left"


def box(x: int, y: int, width: int, height: int) -> list[float]:
    """A COCO polygon of a rectangle, which covers exactly width x height pixels."""
    return [float(v) for v in (x, y, x, y + height, x + width, y + height, x + width, y)]


def crowd_rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths of a mask bool [H, W]: column by column, zeros first."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": runs if not flat[0] else [0, *runs]}


def sentences(first_id: int, *texts: str) -> list[dict]:
    cleaned = [text.lower().replace(".", "") for text in texts]
    return [
        {"sent_id": first_id + n, "raw": raw, "sent": sent, "tokens": sent.split()}
        for n, (raw, sent) in enumerate(zip(texts, cleaned))
    ]


def build_refer_root(root: Path) -> Path:
    """Write twelve images and three annotation sets (refcoco unc and google as .p, refcocog umd as .json) below `root`.

    Splits of refcoco/unc: train 8, val 2, testA 1, testB 1 images with two refs each. Image 9 is train in refcoco/unc and val in
    refcocog/umd. One image is gray, one annotation is a crowd, one has two overlapping polygons, one sentence is not ASCII.
    """
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations, refs = [], [], []
    for place, image_id in enumerate(IMAGE_IDS):
        width, height = [(64, 48), (48, 64), (70, 50)][place % 3]
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        picture = Image.fromarray(
            random.integers(90, 150, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        )
        picture = picture.resize((width, height))
        draw = ImageDraw.Draw(picture)
        for side, color in enumerate(random.permutation(list(COLORS))[:2]):
            x, y = (
                side * width // 2 + int(random.integers(2, 8)),
                int(random.integers(2, height - 20)),
            )
            w, h = int(random.integers(8, 16)), int(random.integers(8, 16))
            draw.rectangle([x, y, x + w - 1, y + h - 1], fill=COLORS[color])
            ann_id = 100 * image_id + side
            segmentation: list | dict = [box(x, y, w, h)]
            if image_id == 138 and side == 0:
                ann_id, mask = CROWD_ANNOTATION, np.zeros((height, width), bool)
                mask[y : y + h, x : x + w] = True
                segmentation = crowd_rle(mask)
            if image_id == 72 and side == 1:
                ann_id, segmentation = (
                    OVERLAPPING_ANNOTATION,
                    [box(x, y, w, h), box(x + 4, y + 4, w, h)],
                )
            category = CATEGORIES[side]["id"]
            annotations.append(
                {
                    "id": ann_id,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": segmentation,
                    "iscrowd": int(isinstance(segmentation, dict)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                }
            )
            where = "left" if side == 0 else "right"
            ref_id = 2 * place + side
            texts = [f"{color} box on the {where}.", f"The {where} box"]
            if place % 2 == 0:
                texts = [f"the {color} one", f"{where} thing", f"{color} box"]
            if ref_id == 0:
                texts = [ACCENTED, *texts]
            refs.append(
                {
                    "ref_id": ref_id,
                    "ann_id": ann_id,
                    "image_id": image_id,
                    "category_id": category,
                    "split": SPLITS[place],
                    "file_name": f"COCO_train2014_{image_id:012d}_{side}.jpg",
                    "sentences": sentences(10 * ref_id, *texts),
                    "sent_ids": [10 * ref_id + n for n in range(len(texts))],
                }
            )
        picture.convert("L" if image_id == GRAY_IMAGE else "RGB").save(folder / name, quality=90)
    unnamed = {
        "id": 7,
        "image_id": 9,
        "category_id": 44,
        "segmentation": [box(0, 0, 4, 4)],
        "iscrowd": 0,
    }
    annotations.append(unnamed)
    instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    google = [
        {**ref, "split": "val" if ref["image_id"] in (9, 25) else "train"} for ref in refs[:8]
    ]
    umd = [{**ref, "split": "val" if ref["image_id"] == 9 else "train"} for ref in refs[:4]]
    for dataset in ("refcoco", "refcocog"):
        (root / dataset).mkdir()
        (root / dataset / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(as_python_2_read(refs), protocol=2))
    (root / "refcoco" / "refs(google).p").write_bytes(
        pickle.dumps(as_python_2_read(google), protocol=2)
    )
    (root / "refcocog" / "refs(umd).json").write_text(
        json.dumps(umd, ensure_ascii=False), encoding="utf-8"
    )
    return root


def change_index(packed: Path, change: Callable[[dict], object]) -> None:
    """Let `change` alter the index of a packed set in place."""
    file = packed / "index.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def as_python_2_read(value: object) -> object:
    """Texts as a latin1 reader sees the UTF-8 bytes of a Python 2 `str`."""
    if isinstance(value, str):
        return value.encode("utf-8").decode("latin1")
    if isinstance(value, dict):
        return {key: as_python_2_read(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_python_2_read(inner) for inner in value]
    return value


@pytest.fixture(scope="session")
def _refer_root_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_refer_root(tmp_path_factory.mktemp("refer") / "root")


@pytest.fixture(scope="session")
def _packed_once(_refer_root_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coupalign.data.packing.pack import pack
    from coupalign.data.packing.recipe import Recipe

    sets = [{"dataset": "refcoco", "split_by": "unc"}, {"dataset": "refcocog", "split_by": "umd"}]
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "root": _refer_root_once,
            "sets": sets,
            "max_images": 4,
            "vocabulary_size": 120,
        }
    )
    out = tmp_path_factory.mktemp("packed") / "small"
    pack(recipe, out, workers=1, progress=False)
    return out


@pytest.fixture
def refer_root(_refer_root_once: Path, tmp_path: Path) -> Path:
    """A private copy of the small `refer` layout: `recipe.root`."""
    return shutil.copytree(_refer_root_once, tmp_path / "refer_root")


@pytest.fixture
def packed(_packed_once: Path, tmp_path: Path) -> Path:
    """A private copy of the packed small set: 3 shards of 4 images, refcoco/unc and refcocog/umd, a vocabulary of 120."""
    return shutil.copytree(_packed_once, tmp_path / "packed")
