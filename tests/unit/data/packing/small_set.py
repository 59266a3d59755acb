"""The small set of `refer_root` (see conftest.py): its recipe, how to pack it, and its files."""

from __future__ import annotations

from pathlib import Path

from coupalign.data.packing.pack import PackReport, pack
from coupalign.data.packing.recipe import Recipe

SETS = ({"dataset": "refcoco", "split_by": "unc"}, {"dataset": "refcocog", "split_by": "umd"})


def recipe_of(root: Path, **changes: object) -> Recipe:
    """The recipe of the fixture `packed`, with changes."""
    settings = {
        "name": "small",
        "root": root,
        "sets": SETS,
        "max_images": 4,
        "vocabulary_size": 120,
        **changes,
    }
    return Recipe.model_validate(settings)


def pack_quietly(recipe: Recipe, out: Path, **options: object) -> PackReport:
    return pack(recipe, out, progress=False, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def image_path(root: Path, image_id: int) -> Path:
    return root / "images/train2014" / f"COCO_train2014_{image_id:012d}.jpg"
