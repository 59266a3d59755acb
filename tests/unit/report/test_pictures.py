"""Saved pictures: the list next to them, what is drawn, and damage that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.errors import InputError
from coupalign.evaluation.protocols import boundary
from coupalign.evaluation.shelf import Picture
from coupalign.report.pictures import read_pictures, save_pictures
from tests.unit.report.examples import evaluation_of


def draw(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.image)


def test_saved_pictures_are_read_back_by_group(tmp_path: Path):
    files = save_pictures(tmp_path / "val", evaluation_of(), 2)

    groups = read_pictures(tmp_path / "val")

    sizes = {group: len(pictures) for group, pictures in groups.items()}
    assert sizes == {"random": 2, "best": 2, "median": 2, "worst": 2}
    assert len(files) == 8
    assert all(file.is_file() for file in files)
    best = [picture.iou for picture in groups["best"]]
    assert best == sorted(best, reverse=True)


def test_saving_replaces_folder(tmp_path: Path):
    save_pictures(tmp_path / "val", evaluation_of(), 2)
    save_pictures(tmp_path / "val", evaluation_of(2), 1)

    assert len(list((tmp_path / "val").iterdir())) == 4 + 1


def test_folder_without_list_has_no_pictures(tmp_path: Path):
    assert read_pictures(tmp_path / "none") == {}


def test_list_describes_samples(tmp_path: Path):
    evaluation = evaluation_of()
    save_pictures(tmp_path / "val", evaluation, 8)

    pictures = {picture.name: picture for picture in evaluation.pictures}
    for saved in read_pictures(tmp_path / "val")["best"]:
        picture = pictures[saved.name]
        assert (saved.sentence, saved.same_class) == (picture.sentence, picture.same_class)
        assert (saved.area, saved.pixels) == (picture.truth.sum(), picture.truth.size)
        assert saved.why == ""

        masks = (picture.truth, picture.prediction)
        a, b = (boundary(torch.from_numpy(mask)) for mask in masks)
        boundary_iou = ((a & b).sum() / (a | b).sum()).item()
        assert saved.iou == pytest.approx(picture.iou, abs=1e-6)
        assert saved.boundary == pytest.approx(boundary_iou, abs=1e-6)


def test_heading_of_strip_is_text_and_the_rest_is_not(tmp_path: Path):
    save_pictures(tmp_path / "val", evaluation_of(), 8)

    for saved in read_pictures(tmp_path / "val")["best"]:
        with Image.open(tmp_path / "val" / saved.file) as strip:
            pixels = np.asarray(strip).astype(int)
        colorfulness = np.ptp(pixels, axis=2)
        assert colorfulness[: saved.heading].max() <= 10
        assert colorfulness[saved.heading :].max() > 100


def test_first_pictures_of_each_group_are_explained(tmp_path: Path):
    asked = []

    def explain(picture: Picture) -> Image.Image | None:
        asked.append(picture.number)
        return draw(picture) if picture.number % 2 else None

    files = save_pictures(
        tmp_path / "val", evaluation_of(), 3, explain=explain, explained_per_group=2
    )

    groups = read_pictures(tmp_path / "val").values()
    assert len(asked) == 4 * 2
    assert not any(saved.why for pictures in groups for saved in pictures[2:])
    whys = [tmp_path / "val" / saved.why for group in groups for saved in group if saved.why]
    assert 0 < len(whys) < 8
    assert set(whys) < set(files)


def test_missing_picture_files_are_named(tmp_path: Path):
    files = save_pictures(tmp_path / "val", evaluation_of(), 1, explain=draw)

    for file in files[:2]:  # a strip and an explanation
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=file.name):
            read_pictures(tmp_path / "val")
        file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", ["{", [{}], [{"group": "best"}], {"a": 1}, [{"area": "x"}], "7", "null"], ids=str
)
def test_damaged_list_is_named(tmp_path: Path, damage: Any):
    save_pictures(tmp_path / "val", evaluation_of(), 1)
    path = tmp_path / "val" / "pictures.json"
    first = json.loads(path.read_text())[0]

    if damage == [{"area": "x"}]:
        damage = [{**first, "area": "x"}]
    path.write_text(damage if isinstance(damage, str) else json.dumps(damage))

    with pytest.raises(InputError, match=r"pictures\.json.*--pictures"):
        read_pictures(tmp_path / "val")


def change_entries(folder: Path, **changes: Any) -> None:
    """Change the same fields in every entry of a list of pictures."""
    path = folder / "pictures.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([{**entry, **changes} for entry in entries]))


@pytest.mark.parametrize("field", ["file", "why"])
@pytest.mark.parametrize(
    "name", ["../private.png", "/{folder}/private.png", "sub/../best-1.png", ".."]
)
def test_picture_outside_of_its_folder_is_not_shown(tmp_path: Path, field: str, name: str):
    """As in a run directory that somebody else made."""
    save_pictures(tmp_path / "val", evaluation_of(), 1)
    Image.new("RGB", (33, 21)).save(tmp_path / "private.png")

    change_entries(tmp_path / "val", **{field: name.format(folder=tmp_path)})

    with pytest.raises(InputError, match=r"pictures\.json: file .* is not in the same folder"):
        read_pictures(tmp_path / "val")


def test_link_to_a_picture_outside_is_not_shown(tmp_path: Path):
    save_pictures(tmp_path / "val", evaluation_of(), 1)
    Image.new("RGB", (33, 21)).save(tmp_path / "private.png")
    (tmp_path / "val" / "link.png").symlink_to("../private.png")

    change_entries(tmp_path / "val", file="link.png")

    with pytest.raises(InputError, match="'link.png' is not in the same folder"):
        read_pictures(tmp_path / "val")


@pytest.mark.parametrize(
    "changes",
    [{"area": 7, "pixels": 5}, {"pixels": 10**400}, {"area": -1}, {"iou": "x" * 10_000}],
    ids=["area", "pixels", "negative", "text"],
)
def test_numbers_of_a_foreign_list_are_checked_in_one_line(tmp_path: Path, changes: dict[str, Any]):
    save_pictures(tmp_path / "val", evaluation_of(), 1)

    change_entries(tmp_path / "val", **changes)

    with pytest.raises(InputError, match=r"pictures\.json: damaged") as error:
        read_pictures(tmp_path / "val")
    assert len(str(error.value)) < 250 + len(str(tmp_path))
