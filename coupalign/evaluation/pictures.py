"""Scored samples to look at: which are kept, which are shown, and the folder they lie in.

pictures/val/
  pictures.json           [{"group": "best", "file": "best-1.png", "name": …, "sentence": …, "iou": 0.93, …}, …], see `Kept`
  best-1.png …            sentence, photograph, truth, prediction, difference, boundaries
  best-1-why.png …        for a few: what the model looked at
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from coupalign.errors import InputError
from coupalign.evaluation.metrics import ious
from coupalign.evaluation.protocols import boundary
from coupalign.files import whole_directory, write_json
from coupalign.viz import intersection_over_union, sample_panels, with_heading

if TYPE_CHECKING:
    from coupalign.evaluation.evaluator import Evaluation

LIST = "pictures.json"
_DRAWN = 4  # random pictures kept for one shown: the ones near the median come from them


@dataclass(frozen=True)
class Picture:
    """One scored sample to look at.

    Attributes:
        image: uint8 [H, W, 3].
        truth, prediction: bool [H, W].
        same_class: other objects of the truth's class in the image; -1 where that is not known.
        boundary: boundary IoU as it was scored; none: that of the two masks.
    """

    number: int
    name: str
    sentence: str
    iou: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    same_class: int = -1
    boundary: float | None = None


@dataclass(frozen=True)
class Kept:
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


def choose_pictures(
    pictures: Sequence[Picture], rows: np.ndarray, many: int
) -> dict[str, list[Picture]]:
    """Groups of at most `many` pictures for a page: {"random": …, "best": …, "median": …, "worst": …}.

    Best and worst are exact among the samples of the rank that kept the pictures; "random" is a fair draw from them, and
    "median" are those of a larger draw whose IoU is nearest to the median of `rows`. A picture may be in two groups,
    except that none is in both "random" and "median" where there are enough.
    """
    unique = list({picture.number: picture for picture in pictures}.values())
    ranked = sorted(unique, key=lambda picture: (picture.iou, picture.number))
    drawn = sorted(unique, key=_lot)[: _DRAWN * many]
    middle = float(np.median(ious(rows)))
    others = drawn[many:] or drawn
    near = sorted(others, key=lambda picture: (abs(picture.iou - middle), picture.number))
    return {
        "random": drawn[:many],
        "best": ranked[::-1][:many],
        "median": near[:many],
        "worst": ranked[:many],
    }


def _lot(picture: Picture) -> int:
    """A number drawn for each sample: the smallest lots of any samples are a fair and repeatable sample of them."""
    return (picture.number + 1) * 2654435761 % 2**32


def prune(shelf: list[Picture], many: int) -> list[Picture]:
    """Keep the best, the worst and a fair draw, which pruning again cannot bias: the memory is bounded."""
    ranked = sorted(shelf, key=lambda picture: (picture.iou, picture.number))
    ends = {picture.number for picture in ranked[:many] + ranked[max(0, len(ranked) - many) :]}
    drawn = {picture.number for picture in sorted(shelf, key=_lot)[: _DRAWN * many]}
    return [picture for picture in shelf if picture.number in ends | drawn]


def keep_pictures(
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
    listed: list[Kept] = []
    with whole_directory(folder) as partial:
        for group, pictures in choose_pictures(evaluation.pictures, evaluation.rows, many).items():
            for place, picture in enumerate(pictures, 1):
                why = explain(picture) if explain is not None and place <= explained else None
                listed.append(_keep(partial, group, f"{group}-{place}", picture, why))
        write_json(partial / LIST, [asdict(kept) for kept in listed])
    return [folder / file for kept in listed for file in (kept.file, kept.why) if file]


def _keep(folder: Path, group: str, stem: str, picture: Picture, why: Image.Image | None) -> Kept:
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
    return Kept(
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


def read_pictures(folder: Path) -> dict[str, list[Kept]]:
    """The list of a folder of `keep_pictures` by group, in its order; empty where there is no such folder.

    Raises:
        InputError: the list is damaged, or a file of it is missing.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    groups: dict[str, list[Kept]] = {}
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


def _kept(entry: dict[str, Any]) -> Kept:
    """A line of the list; lists of older versions lack the later fields."""
    boundary = entry.get("boundary")
    return Kept(
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
