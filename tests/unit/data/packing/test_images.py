"""Finding the photographs of the annotations."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from coupalign.data.packing.images import find_images, read_photograph
from coupalign.data.packing.refer import Referral, read_annotation_set


@pytest.mark.parametrize(
    "folder_name",
    [
        "images/mscoco/images/train2014",
        "images/train2014",
        "images/train2017",
        "train2017",
        "elsewhere",
    ],
)
@pytest.mark.parametrize("pattern", ["COCO_train2014_{:012d}.jpg", "{:012d}.jpg"])
def test_images_are_found_in_customary_folders_under_both_names(
    refer_root: Path, folder_name: str, pattern: str
) -> None:
    referrals = read_annotation_set(refer_root, "refcoco", "unc")[0]
    folder = refer_root / folder_name
    old = (refer_root / "images/train2014").rename(refer_root / "old")
    folder.mkdir(parents=True)
    for image_id in {ref.image_id for ref in referrals} - {9, 72}:
        (old / f"COCO_train2014_{image_id:012d}.jpg").rename(folder / pattern.format(image_id))

    given = folder if folder_name == "elsewhere" else None
    found, missing = find_images(refer_root, referrals, given)

    assert set(missing) == {9, 72}
    assert missing[9] == "COCO_train2014_000000000009.jpg"
    assert len(found) == 10
    for image in found.values():
        assert image.path.parent == folder
        assert image.bytes == image.path.stat().st_size


def name_pictures(refer_root: Path, names: dict[int, str]) -> list[Referral]:
    """Name some images of refcoco/unc in the annotations, and write one file for each name."""
    referrals = read_annotation_set(refer_root, "refcoco", "unc")[0]
    folder = refer_root / "images/train2014"
    for image_id, name in names.items():
        old = folder / f"COCO_train2014_{image_id:012d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(old.read_bytes())
        old.unlink()
    return [replace(ref, file_name=names.get(ref.image_id, ref.file_name)) for ref in referrals]


def test_pictures_of_one_name_in_two_folders_are_kept_apart(refer_root: Path) -> None:
    names = {9: "seqA/00000.jpg", 25: "seqB/00000.jpg"}
    referrals = name_pictures(refer_root, names)

    found, missing = find_images(refer_root, referrals)

    assert not missing
    folder = refer_root / "images/train2014"
    assert {image_id: found[image_id].path for image_id in names} == {
        9: folder / "seqA/00000.jpg",
        25: folder / "seqB/00000.jpg",
    }


def test_folders_that_were_flattened_are_found_where_the_names_differ(refer_root: Path) -> None:
    referrals = name_pictures(refer_root, {9: "a.jpg", 25: "00000.jpg"})
    names = {9: "seqA/a.jpg", 25: "seqA/00000.jpg", 72: "seqB/00000.jpg"}
    referrals = [replace(r, file_name=names.get(r.image_id, r.file_name)) for r in referrals]

    found, missing = find_images(refer_root, referrals)

    assert found[9].path.name == "a.jpg"
    # Which of the two it was cannot be known.
    assert missing == {25: "seqA/00000.jpg", 72: "seqB/00000.jpg"}


def test_picture_of_coco_with_the_same_number_is_not_taken(refer_root: Path) -> None:
    """Own pictures are numbered from 1 as well."""
    referrals = name_pictures(refer_root, {9: "000000000009.jpg"})
    own = [replace(r, file_name="kitchen.jpg") if r.image_id == 9 else r for r in referrals]

    assert find_images(refer_root, referrals)[1] == {}
    assert find_images(refer_root, own)[1] == {9: "kitchen.jpg"}


def jpeg(width: int, height: int, orientation: int | None, mode: str = "RGB") -> bytes:
    """A smooth JPEG with an EXIF orientation."""
    colors = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif, quality=95)
    return stream.getvalue()


def stored_pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("orientation", [None, 1])
def test_photograph_without_a_turn_is_packed_byte_by_byte(orientation: int | None) -> None:
    data = jpeg(40, 30, orientation)

    assert read_photograph(data, 30, 40) == (data, None)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_photograph_is_turned_where_its_annotations_fit_what_a_viewer_shows(
    orientation: int, mode: str
) -> None:
    data = jpeg(40, 30, orientation, mode)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    packed, turning = read_photograph(data, shown.height, shown.width)

    assert turning == "turned"
    assert Image.open(io.BytesIO(packed)).getexif().get(0x0112, 1) == 1
    difference = np.abs(stored_pixels(packed) - np.asarray(shown.convert("RGB")).astype(int))
    assert difference.mean() < 2


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_photograph_stays_where_its_annotations_fit_the_stored_pixels(orientation: int) -> None:
    data = jpeg(40, 30, orientation)

    assert read_photograph(data, 30, 40) == (data, "as stored")


def test_square_photograph_is_turned_as_a_viewer_shows_it() -> None:
    data = jpeg(40, 40, 6)

    packed, turning = read_photograph(data, 40, 40)

    assert turning == "turned"
    expected = stored_pixels(data)[::-1].transpose(1, 0, 2)
    assert np.abs(stored_pixels(packed) - expected).mean() < 2


def test_photograph_with_damaged_exif_stays_as_stored() -> None:
    data = jpeg(40, 30, 6).replace(b"MM\0*", b"??\0*")

    assert read_photograph(data, 30, 40) == (data, "unknown")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photograph_of_a_third_size_is_refused(orientation: int) -> None:
    with pytest.raises(ValueError, match="but its annotations are for 50 x 30"):
        read_photograph(jpeg(40, 30, orientation), 30, 50)


def test_turned_photograph_that_is_cut_short_is_refused() -> None:
    with pytest.raises(ValueError, match="does not decode"):
        read_photograph(jpeg(40, 30, 6)[:-40], 40, 30)
