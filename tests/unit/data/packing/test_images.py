"""Finding the photographs of the annotations."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.data.packing.images import find_images
from coupalign.data.packing.refer import read_annotation_set


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
