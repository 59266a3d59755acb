"""A small data set in the layout of `refer`, with the oddities of real files, and packed."""

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
SPLITS = ["train"] * 8 + ["val", "val", "testA", "testB"]  # one per image
IMAGE_IDS = [9, 25, 72, 138, 309, 326, 575, 625, 40961, 106499, 353072, 573854]
GRAY_IMAGE = 25
CROWD_ANNOTATION = 900100000138
OVERLAPPING_ANNOTATION = 41510
ACCENTED = "red box at the café – left"


def box(x: int, y: int, width: int, height: int) -> list[float]:
    """Return the COCO polygon of a rectangle that covers exactly width x height pixels."""
    return [float(v) for v in (x, y, x, y + height, x + width, y + height, x + width, y)]


def crowd_rle(mask: np.ndarray) -> dict:
    """Encode a mask bool [H, W] in COCO's uncompressed run lengths: by columns, zeros first."""
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
    """Write twelve images and three annotation sets in the layout of `refer`.

    refcoco/unc and refcoco/google are pickles, refcocog/umd is JSON. The splits of refcoco/unc have
    8 (train), 2 (val), 1 (testA) and 1 (testB) images, with two refs each. Image 9 is in the train
    split of refcoco/unc and in the val split of refcocog/umd. One image is gray, one annotation is
    a crowd, one has two overlapping polygons, and one sentence is not ASCII.
    """
    folder = root / "images" / "train2014"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations, refs = [], [], []
    for number, image_id in enumerate(IMAGE_IDS):
        width, height = [(64, 48), (48, 64), (70, 50)][number % 3]
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})

        # A noisy background with one rectangle in each half.
        small = rng.integers(90, 150, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height))
        draw = ImageDraw.Draw(picture)
        for half, color in enumerate(rng.permutation(list(COLORS))[:2]):
            x = half * width // 2 + int(rng.integers(2, 8))
            y = int(rng.integers(2, height - 20))
            w, h = int(rng.integers(8, 16)), int(rng.integers(8, 16))
            draw.rectangle([x, y, x + w - 1, y + h - 1], fill=COLORS[color])
            annotation = _annotation(image_id, half, (x, y, w, h), (height, width))
            annotations.append(annotation)
            refs.append(_ref(annotation, number, half, color))
        mode = "L" if image_id == GRAY_IMAGE else "RGB"
        picture.convert(mode).save(folder / name, quality=90)

    # An object that no ref is about.
    annotations.append(
        {
            "id": 7,
            "image_id": 9,
            "category_id": 44,
            "segmentation": [box(0, 0, 4, 4)],
            "iscrowd": 0,
        }
    )
    instances = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    _write_sets(root, instances, refs)
    return root


def _annotation(
    image_id: int, half: int, rectangle: tuple[int, int, int, int], size: tuple[int, int]
) -> dict:
    x, y, w, h = rectangle
    ann_id = 100 * image_id + half
    segmentation: list | dict = [box(x, y, w, h)]
    if (image_id, half) == (138, 0):
        ann_id, mask = CROWD_ANNOTATION, np.zeros(size, bool)
        mask[y : y + h, x : x + w] = True
        segmentation = crowd_rle(mask)
    if (image_id, half) == (72, 1):
        ann_id = OVERLAPPING_ANNOTATION
        segmentation.append(box(x + 4, y + 4, w, h))
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": CATEGORIES[half]["id"],
        "segmentation": segmentation,
        "iscrowd": int(isinstance(segmentation, dict)),
        "bbox": [x, y, w, h],
        "area": w * h,
    }


def _ref(annotation: dict, image_number: int, half: int, color: str) -> dict:
    ref_id, image_id = 2 * image_number + half, annotation["image_id"]
    where = "left" if half == 0 else "right"
    texts = [f"{color} box on the {where}.", f"The {where} box"]
    if image_number % 2 == 0:
        texts = [f"the {color} one", f"{where} thing", f"{color} box"]
    if ref_id == 0:
        texts = [ACCENTED, *texts]
    return {
        "ref_id": ref_id,
        "ann_id": annotation["id"],
        "image_id": image_id,
        "category_id": annotation["category_id"],
        "split": SPLITS[image_number],
        "file_name": f"COCO_train2014_{image_id:012d}_{half}.jpg",
        "sentences": sentences(10 * ref_id, *texts),
        "sent_ids": [10 * ref_id + n for n in range(len(texts))],
    }


def _write_sets(root: Path, instances: dict, refs: list[dict]) -> None:
    for dataset in ("refcoco", "refcocog"):
        (root / dataset).mkdir()
        (root / dataset / "instances.json").write_text(json.dumps(instances), encoding="utf-8")

    google = _with_val_images(refs[:8], {9, 25})
    for split_by, records in (("unc", refs), ("google", google)):
        data = pickle.dumps(as_python_2_read(records), protocol=2)
        (root / "refcoco" / f"refs({split_by}).p").write_bytes(data)

    umd = json.dumps(_with_val_images(refs[:4], {9}), ensure_ascii=False)
    (root / "refcocog" / "refs(umd).json").write_text(umd, encoding="utf-8")


def _with_val_images(refs: list[dict], val_images: set[int]) -> list[dict]:
    """Put the refs of some images into the val split and the others into the train split."""
    return [{**ref, "split": "val" if ref["image_id"] in val_images else "train"} for ref in refs]


def change_index(packed: Path, change: Callable[[dict], object]) -> None:
    """Let `change` alter the index of a packed set in place."""
    file = packed / "index.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def as_python_2_read(value: object) -> object:
    """Change texts to what a latin1 reader sees in the UTF-8 bytes of a Python 2 `str`."""
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
    from tests.unit.data.packing.small_set import pack_quietly, recipe_of

    out = tmp_path_factory.mktemp("packed") / "small"
    pack_quietly(recipe_of(_refer_root_once), out, workers=1)
    return out


@pytest.fixture
def refer_root(_refer_root_once: Path, tmp_path: Path) -> Path:
    """A private copy of the small `refer` layout: `recipe.root`."""
    return shutil.copytree(_refer_root_once, tmp_path / "refer_root")


@pytest.fixture
def packed(_packed_once: Path, tmp_path: Path) -> Path:
    """A private copy of the packed small set: refcoco/unc and refcocog/umd.

    It has 3 shards of 4 images and a vocabulary of 120.
    """
    return shutil.copytree(_packed_once, tmp_path / "packed")
