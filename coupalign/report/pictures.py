"""Write the pictures of a scoring next to their list, and read them back.

pictures/val/
  pictures.json           [{"group": "best", "file": "best-1.png", "name": …, …}, …], see `Kept`
  best-1.png …            sentence, photograph, truth, prediction, difference, boundaries
  best-1-why.png …        for a few: what the model looked at
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from coupalign.errors import InputError
from coupalign.evaluation.protocols import boundary
from coupalign.evaluation.shelf import Picture, choose_pictures
from coupalign.files import whole_directory, write_json
from coupalign.report.drawing import intersection_over_union, sample_panels, with_heading

if TYPE_CHECKING:
    from coupalign.evaluation.evaluator import Evaluation

LIST = "pictures.json"


@dataclass(frozen=True)
class SavedPicture:
    """One line of pictures.json.

    Attributes:
        group: "best", "median", "worst" or "random".
        file: the strip; its uppermost `heading` pixels are the sentence and the name, as words.
        area, pixels: of the truth and of the image; 0 pixels: not known, the list is of an older version.
        why: the file with what the model looked at, or "".
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
    many: int,
    explain: Callable[[Picture], Image.Image | None] | None = None,
    explained: int = 4,
) -> list[Path]:
    """Draw the chosen pictures of an evaluation into `folder`, which is replaced as a whole; returns the files.

    Args:
        explain: draws what the model looked at, see `explanations.explainer`, for the first `explained` of each group; a
            model that has nothing to show gives none.
    """
    listed: list[SavedPicture] = []
    with whole_directory(folder) as partial:
        for group, pictures in choose_pictures(evaluation.pictures, evaluation.rows, many).items():
            for place, picture in enumerate(pictures, 1):
                why = explain(picture) if explain is not None and place <= explained else None
                listed.append(_keep(partial, group, f"{group}-{place}", picture, why))
        write_json(partial / LIST, [asdict(kept) for kept in listed])
    return [folder / file for kept in listed for file in (kept.file, kept.why) if file]


def _keep(
    folder: Path, group: str, stem: str, picture: Picture, why: Image.Image | None
) -> SavedPicture:
    truth, prediction = picture.truth, picture.prediction
    bands = _band(truth), _band(prediction)
    edges = intersection_over_union(*bands) if picture.boundary is None else picture.boundary
    area, pixels = int(truth.sum()), truth.size
    facts = [
        f"IoU {picture.iou:.3f}",
        f"boundary IoU {edges:.3f}",
        f"size {100 * area / pixels:.1f} % of the image",
    ]
    facts += [f"others of its class: {picture.same_class}"] if picture.same_class >= 0 else []
    panels = sample_panels(picture.image, truth, prediction, bands, facts)
    whole = with_heading(panels, picture.sentence, picture.name)
    whole.save(folder / f"{stem}.png")
    if why is not None:
        why.save(folder / f"{stem}-why.png")
    return SavedPicture(
        group,
        f"{stem}.png",
        picture.name,
        picture.sentence,
        round(picture.iou, 6),
        round(edges, 6),
        area,
        pixels,
        picture.same_class,
        whole.height - panels.height,
        f"{stem}-why.png" if why is not None else "",
    )


def _band(mask: np.ndarray) -> np.ndarray:
    return boundary(torch.from_numpy(np.ascontiguousarray(mask))).numpy()


def read_pictures(folder: Path) -> dict[str, list[SavedPicture]]:
    """The list of a folder of `keep_pictures` by group, in its order; empty where there is no such folder.

    Raises:
        InputError: the list is damaged, or a file of it is missing.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    groups: dict[str, list[SavedPicture]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            kept = _kept(entry)
            groups.setdefault(kept.group, []).append(kept)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); score with --pictures again") from None
    files = [
        file
        for group in groups.values()
        for kept in group
        for file in (kept.file, kept.why)
        if file
    ]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise InputError(
            f"{folder / missing[0]}: listed in {LIST} but not there; score with --pictures again"
        )
    return groups


def _kept(entry: dict[str, Any]) -> SavedPicture:
    """A line of the list; lists of older versions lack the later fields."""
    boundary = entry.get("boundary")
    return SavedPicture(
        str(entry["group"]),
        str(entry["file"]),
        str(entry["name"]),
        str(entry["sentence"]),
        float(entry["iou"]),
        None if boundary is None else float(boundary),
        int(entry.get("area", 0)),
        int(entry.get("pixels", 0)),
        int(entry.get("same_class", -1)),
        int(entry.get("heading", 0)),
        str(entry.get("why", "")),
    )
