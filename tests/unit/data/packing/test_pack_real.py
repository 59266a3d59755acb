"""Packing real records and photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coupalign.cli.parser import main
from coupalign.data.packing.pack import inspect, pack
from coupalign.data.packing.recipe import AnnotationSet, Recipe, read_recipe
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError

RECIPES = Path(__file__).parents[4] / "shards" / "recipes"


def pack_one_set(root: Path, dataset: str, split_by: str, out: Path):
    sets = (AnnotationSet(dataset=dataset, split_by=split_by),)
    recipe = Recipe(name="real", root=root, sets=sets, vocabulary_size=None)
    return pack(recipe, out, progress=False)


def test_dry_run_lists_what_is_missing_and_writes_nothing(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFER_ROOT", str(real_data / "real_records"))
    recipe = read_recipe(RECIPES / "all.yaml")

    report = inspect(recipe)

    numbers = [split for splits in report.counts.values() for split in splits.values()]
    assert len(report.counts) == 5
    assert sum(split["refs"] for split in numbers) == 28
    assert sum(split["sentences"] for split in numbers) == 72
    assert report.state == "dry run"
    assert len(report.missing_images) == 4
    missing = "4 of 4 images are missing (28 refs need them): COCO_train2014_000000460986.jpg"
    assert missing in report.table()

    with pytest.raises(InputError, match="4 of 4 images are missing"):
        pack(recipe, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_real_photographs_are_packed(real_data: Path, tmp_path: Path) -> None:
    report = pack_one_set(real_data / "mini_refcoco", "refcocog", "demo", tmp_path / "out")

    assert report.images == 7
    assert sum(split["refs"] for split in report.counts["refcocog/demo"].values()) == 8
    assert verify(tmp_path / "out").ok


def test_leaks_between_real_sets_are_reported(
    real_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Photograph 460986 is in the train split of all four sets, and in val of G-Ref google."""
    # The real records, with colored pictures in the place of the photographs.
    records, root = real_data / "real_records", tmp_path / "refer"
    photographs = root / "images" / "train2014"
    photographs.mkdir(parents=True)
    for dataset in ("refcoco", "refcoco+", "refcocog"):
        (root / dataset).symlink_to(records / dataset)
        for image in json.loads((records / dataset / "instances.json").read_text())["images"]:
            small = np.random.default_rng(image["id"]).integers(0, 256, (9, 9, 3), np.uint8)
            picture = Image.fromarray(small).resize((image["width"], image["height"]))
            picture.save(photographs / image["file_name"])

    sets = [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refcocog", "google")]
    packed = []
    for dataset, split_by in sets:
        packed.append(str(tmp_path / f"{dataset}-{split_by}"))
        pack_one_set(root, dataset, split_by, packed[-1])
    assert main(["verify", "--leaks", *packed, "--json"]) == 0

    answer = json.loads(capfd.readouterr().out.splitlines()[-1])
    shared = {(first, second): count for first, second, count in answer["shared"]}
    leaks = {
        train
        for train, scored in shared
        if scored == "refcocog/google val" and train.endswith("train")
    }
    assert leaks == {f"{dataset}/{split_by} train" for dataset, split_by in sets}
    assert all(shared[train, "refcocog/google val"] == 1 for train in leaks)
