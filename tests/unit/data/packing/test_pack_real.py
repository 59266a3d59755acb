"""Packing real records and photographs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from coupalign.cli.parser import main
from coupalign.data.packing.pack import inspect, pack
from coupalign.data.packing.recipe import AnnotationSet, Recipe, read_recipe
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError

RECIPES = Path(__file__).parents[4] / "shards" / "recipes"


def test_dry_run_on_real_records(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFER_ROOT", str(real_data / "real_records"))
    recipe = read_recipe(RECIPES / "all.yaml")
    report = inspect(recipe)
    numbers = [split for splits in report.counts.values() for split in splits.values()]
    assert (
        len(report.counts) == 5
        and sum(n["refs"] for n in numbers) == 28
        and sum(n["sentences"] for n in numbers) == 72
    )
    assert report.state == "dry run" and len(report.missing_images) == 4
    assert (
        "4 of 4 images are missing (28 refs need them): COCO_train2014_000000460986.jpg"
        in report.table()
    )
    with pytest.raises(InputError, match="4 of 4 images are missing"):
        pack(recipe, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_real_photographs(real_data: Path, tmp_path: Path) -> None:
    sets = (AnnotationSet(dataset="refcocog", split_by="demo"),)
    report = pack(
        Recipe(name="mini", root=real_data / "mini_refcoco", sets=sets, vocabulary_size=None),
        tmp_path / "out",
        progress=False,
    )
    assert (
        report.images == 7 and sum(n["refs"] for n in report.counts["refcocog/demo"].values()) == 8
    )
    assert verify(tmp_path / "out").ok


def test_leaks_between_real_records(
    real_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Photograph 460986 is in the train split of all four and in the val split of one, G-Ref google."""
    records, photographs = real_data / "real_records", tmp_path / "refer" / "images" / "train2014"
    photographs.mkdir(parents=True)
    for dataset in ("refcoco", "refcoco+", "refcocog"):
        (tmp_path / "refer" / dataset).symlink_to(records / dataset)
        for image in json.loads((records / dataset / "instances.json").read_text())["images"]:
            Image.new("RGB", (image["width"], image["height"])).save(
                photographs / image["file_name"]
            )
    packed = []
    for dataset, split_by in (
        ("refcoco", "unc"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
    ):
        sets = (AnnotationSet(dataset=dataset, split_by=split_by),)
        packed.append(str(tmp_path / f"{dataset}-{split_by}"))
        pack(
            Recipe(name="records", root=tmp_path / "refer", sets=sets, vocabulary_size=None),
            packed[-1],
            progress=False,
        )
    assert main(["verify", "--leaks", *packed, "--json"]) == 0
    shared = {
        tuple(pair): count
        for *pair, count in json.loads(capfd.readouterr().out.splitlines()[-1])["shared"]
    }
    leaks = {
        train
        for train, scored in shared
        if scored == "refcocog/google val" and train.endswith("train")
    }
    assert leaks == {
        "refcoco/unc train",
        "refcoco+/unc train",
        "refcocog/umd train",
        "refcocog/google train",
    }
    assert all(shared[train, "refcocog/google val"] == 1 for train in leaks)
