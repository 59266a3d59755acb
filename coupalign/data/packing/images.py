"""Find the photographs that the annotations name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from coupalign.data.packing.refer import Referral

# Folders below the root, searched in this order.
IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",  # refer, LAVT, LISA
    "images/train2014",  # CRIS, ReLA, SimREC
    "images/mscoco/images/train2017",
    "images/train2017",
    "train2014",
    "train2017",
)


@dataclass(frozen=True)
class ImageFile:
    path: Path
    bytes: int
    mtime_ns: int


def find_images(
    root: Path, referrals: Iterable[Referral], folder: Path | None = None
) -> tuple[dict[int, ImageFile], dict[int, str]]:
    """Find the image of each referral in `folder`, or else below `root`.

    Below `root`, the first of IMAGE_FOLDERS that has the image wins. In each folder, an image is
    looked for by its name in instances.json, then as `%012d.jpg`.

    Returns:
        The files found and the expected names of the missing ones, both by image_id.
    """
    folders = [Path(folder)] if folder else [Path(root) / name for name in IMAGE_FOLDERS]
    listings = {path: {entry.name for entry in path.iterdir()} for path in folders if path.is_dir()}
    file_names = {referral.image_id: referral.file_name for referral in referrals}

    found: dict[int, ImageFile] = {}
    missing: dict[int, str] = {}
    for image_id, file_name in sorted(file_names.items()):
        path = _find_file((file_name, f"{image_id:012d}.jpg"), listings)
        if path is None:
            missing[image_id] = file_name
        else:
            status = path.stat()
            found[image_id] = ImageFile(path, status.st_size, status.st_mtime_ns)
    return found, missing


def _find_file(names: Iterable[str], listings: dict[Path, set[str]]) -> Path | None:
    """Return the first file with one of `names`; `listings` has the file names of each folder."""
    for folder, listing in listings.items():
        for name in names:
            if name in listing and (folder / name).is_file():
                return folder / name
    return None
