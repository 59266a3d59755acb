"""Find the photographs that the annotations name, and read them as their annotations mean them."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from coupalign.data.packing.refer import Referral
from coupalign.data.packing.verify import check_jpeg
from coupalign.data.pictures import (
    UnknownOrientation,
    load_pixels,
    open_picture,
    orientation_of,
    turn,
)

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


# What was done with a photograph whose EXIF orientation is not 1. "unknown": its EXIF data cannot
# be read, so it is packed as it is stored.
Turning = Literal["turned", "as stored", "unknown"]

# Of a turned photograph. Nothing can be seen of the second compression.
_JPEG_QUALITY = 95


def find_images(
    root: Path, referrals: Iterable[Referral], folder: Path | None = None
) -> tuple[dict[int, ImageFile], dict[int, str]]:
    """Find the image of each referral in `folder`, or else below `root`.

    Below `root`, the first of IMAGE_FOLDERS that has the image wins. In each folder, an image is
    looked for by its path in instances.json, then by its name alone, unless two images have the
    same name in different folders. Images of COCO are also looked for as `%012d.jpg`.

    Returns:
        The files found and the expected names of the missing ones, both by image_id.
    """
    folders = [Path(folder)] if folder else [Path(root) / name for name in IMAGE_FOLDERS]
    listings = {path: {entry.name for entry in path.iterdir()} for path in folders if path.is_dir()}
    file_names: defaultdict[int, set[str]] = defaultdict(set)
    for referral in referrals:
        file_names[referral.image_id].add(referral.file_name)

    # How many images have a name, whatever their folders are.
    images_of_name: Counter[str] = Counter()
    for names in file_names.values():
        images_of_name.update({PurePosixPath(name).name for name in names})

    found: dict[int, ImageFile] = {}
    missing: dict[int, str] = {}
    for image_id in sorted(file_names):
        expected = sorted(file_names[image_id])
        candidates = list(expected)
        for name in expected:
            base_name = PurePosixPath(name).name
            if images_of_name[base_name] == 1:
                candidates.append(base_name)
            if is_coco_name(name, image_id):
                candidates.append(f"{image_id:012d}.jpg")

        path = _find_file(candidates, listings)
        if path is None:
            missing[image_id] = expected[0]
        else:
            status = path.stat()
            found[image_id] = ImageFile(path, status.st_size, status.st_mtime_ns)
    return found, missing


def is_coco_name(file_name: str, image_id: int) -> bool:
    """Whether a picture is named after its number, as COCO does: COCO_train2014_%012d.jpg."""
    stem = PurePosixPath(file_name).stem
    return stem.rpartition("_")[2] == f"{image_id:012d}"


def read_photograph(data: bytes, height: int, width: int) -> tuple[bytes, Turning | None]:
    """Return the JPEG to pack for a photograph of `height` x `width` annotated pixels.

    A photograph with an EXIF orientation is turned as a viewer shows it, because that is what its
    annotators saw. If its annotations fit only the stored pixels, it stays as it is.

    Args:
        data: the bytes of its file.

    Returns:
        The JPEG, whose stored pixels are those of the annotations, and what was done about an
        orientation. None: the photograph has none.

    Raises:
        ValueError: it is not a JPEG, is cut short, or does not have its annotated size.
    """
    image = open_picture(io.BytesIO(data))
    try:
        orientation = orientation_of(image)
    except UnknownOrientation:
        check_jpeg(data, height, width)
        return data, "unknown"

    swaps_sides = orientation >= 5
    shown_size = image.size[::-1] if swaps_sides else image.size
    if orientation == 1 or shown_size != (width, height):
        check_jpeg(data, height, width)
        return data, None if orientation == 1 else "as stored"

    check_jpeg(data, image.height, image.width)
    load_pixels(image)
    colors = image if image.mode == "L" else image.convert("RGB")
    stream = io.BytesIO()
    turn(colors, orientation).save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return stream.getvalue(), "turned"


def _find_file(names: Iterable[str], listings: dict[Path, set[str]]) -> Path | None:
    """Return the first file with one of `names`; `listings` has the file names of each folder."""
    for folder, listing in listings.items():
        for name in names:
            # The first part is listed: a look into the set is quicker than one into the folder.
            if PurePosixPath(name).parts[0] in listing and (folder / name).is_file():
                return folder / name
    return None
