"""Write the pictures of a scoring next to their list, and read the list back.

pictures/val/
  pictures.json           [{"group": "best", "file": "best-1.png", "name": …, …}, …], see
                          `SavedPicture`
  best-1.png …            sentence, image, truth, prediction, difference, boundaries
  best-1-why.png …        for a few: what the model looked at
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from coupalign.data.pictures import load_pixels, open_picture
from coupalign.errors import InputError, quoted
from coupalign.evaluation.protocols import boundary
from coupalign.evaluation.shelf import Picture, choose_pictures
from coupalign.files import read_json, whole_directory, write_json
from coupalign.report.drawing import intersection_over_union, sample_panels, with_heading

if TYPE_CHECKING:
    from coupalign.evaluation.evaluator import Evaluation

LIST_NAME = "pictures.json"


@dataclass(frozen=True, kw_only=True)
class SavedPicture:
    """One entry of pictures.json.

    Attributes:
        group: "best", "median", "worst" or "random".
        file: the strip. Its uppermost `heading` pixels show the sentence and the name.
        name: "<dataset>/<split_by>/<ref_id>/<sent_id>".
        area, pixels: of the truth and of the image. 0 pixels: not known, because the list was
            written by an older version.
        same_class: other objects of its class in the image; -1: not known.
        why: the file that shows what the model looked at, or "".
    """

    group: str
    file: str
    name: str
    sentence: str
    iou: float
    boundary: float | None = None
    area: int = 0
    pixels: int = 0
    same_class: int = -1
    heading: int = 0
    why: str = ""


def save_pictures(
    folder: Path,
    evaluation: Evaluation,
    per_group: int,
    *,
    explain: Callable[[Picture], Image.Image | None] | None = None,
    explained_per_group: int = 4,
) -> list[Path]:
    """Draw the chosen pictures of an evaluation into `folder`; returns the files.

    The folder is replaced as a whole.

    Args:
        explain: draws what the model looked at, see `explanations.build_explainer`. It returns
            None for a model that has nothing to show.
        explained_per_group: only the first few pictures of each group are explained.
    """
    saved: list[SavedPicture] = []
    groups = choose_pictures(evaluation.pictures, evaluation.rows, per_group)
    with whole_directory(folder) as partial:
        for group, pictures in groups.items():
            for number, picture in enumerate(pictures, 1):
                why = None
                if explain is not None and number <= explained_per_group:
                    why = explain(picture)
                saved.append(_save_picture(partial, group, number, picture, why))
        write_json(partial / LIST_NAME, [asdict(entry) for entry in saved])
    return [folder / file for file in _files_of(saved)]


def read_pictures(folder: Path) -> dict[str, list[SavedPicture]]:
    """Read the list of a folder of `save_pictures` by group, in its order.

    Empty if there is no such folder.

    Raises:
        InputError: the list is damaged, or a file of it is missing or outside of the folder.
    """
    path = folder / LIST_NAME
    if not path.is_file():
        return {}

    entries = read_json(path, "the list that `coupalign eval --pictures` writes")
    groups: dict[str, list[SavedPicture]] = {}
    try:
        for entry in entries:
            saved = _parse_entry(entry)
            groups.setdefault(saved.group, []).append(saved)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: damaged ({quoted(str(error))}); score with --pictures again"
        ) from None

    for pictures in groups.values():
        for file in _files_of(pictures):
            _check_inside(folder, file)
    return groups


def _check_inside(folder: Path, file: str) -> None:
    """Raise InputError unless `file`, which may be foreign text, is a file of the folder itself."""
    is_plain = Path(file).name == file != ".." and "\0" not in file
    if not is_plain or (folder / file).is_symlink():
        raise InputError(
            f"{folder / LIST_NAME}: file {quoted(file)} is not in the same folder, so it is not "
            "shown; score with --pictures again"
        )
    if not (folder / file).is_file():
        raise InputError(
            f"{folder / file}: missing, though {LIST_NAME} lists it; score with --pictures again"
        )


def read_strip(file: Path) -> Image.Image:
    """Read one of the files of `save_pictures`, in RGB.

    Raises:
        InputError: it is missing, no PNG, damaged or too large.
    """
    try:
        with open_picture(file, ("PNG",)) as strip:
            load_pixels(strip)
            return strip.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error}; score with --pictures again") from None


def _save_picture(
    folder: Path, group: str, number: int, picture: Picture, why: Image.Image | None
) -> SavedPicture:
    """Draw one picture, and `why` if there is one, as <group>-<number>.png."""
    truth, prediction = picture.truth, picture.prediction
    bands = _boundary_of(truth), _boundary_of(prediction)
    boundary_iou = picture.boundary
    if boundary_iou is None:
        boundary_iou = intersection_over_union(*bands)

    area, pixels = int(truth.sum()), truth.size
    facts = [
        f"IoU {picture.iou:.3f}",
        f"boundary IoU {boundary_iou:.3f}",
        f"size {100 * area / pixels:.1f} % of the image",
    ]
    if picture.same_class >= 0:
        facts.append(f"others of its class: {picture.same_class}")

    panels = sample_panels(picture.image, truth, prediction, bands=bands, facts=facts)
    strip = with_heading(panels, picture.sentence, picture.name)
    file = f"{group}-{number}.png"
    strip.save(folder / file)

    why_file = ""
    if why is not None:
        why_file = f"{group}-{number}-why.png"
        why.save(folder / why_file)

    return SavedPicture(
        group=group,
        file=file,
        name=picture.name,
        sentence=picture.sentence,
        iou=round(picture.iou, 6),
        boundary=round(boundary_iou, 6),
        area=area,
        pixels=pixels,
        same_class=picture.same_class,
        heading=strip.height - panels.height,
        why=why_file,
    )


def _boundary_of(mask: np.ndarray) -> np.ndarray:
    return boundary(torch.from_numpy(np.ascontiguousarray(mask))).numpy()


def _files_of(pictures: Iterable[SavedPicture]) -> list[str]:
    files = []
    for picture in pictures:
        files.append(picture.file)
        if picture.why:
            files.append(picture.why)
    return files


def _parse_entry(entry: dict[str, Any]) -> SavedPicture:
    """Parse one entry of the list. Lists of older versions lack the later fields."""
    boundary_iou = entry.get("boundary")
    area, pixels = int(entry.get("area", 0)), int(entry.get("pixels", 0))
    if not 0 <= area <= pixels < 2**53:
        raise ValueError(f"area {area:.3g} of {pixels:.3g} pixels")
    return SavedPicture(
        group=str(entry["group"]),
        file=str(entry["file"]),
        name=str(entry["name"]),
        sentence=str(entry["sentence"]),
        iou=float(entry["iou"]),
        boundary=None if boundary_iou is None else float(boundary_iou),
        area=area,
        pixels=pixels,
        same_class=int(entry.get("same_class", -1)),
        heading=max(0, int(entry.get("heading", 0))),
        why=str(entry.get("why", "")),
    )
