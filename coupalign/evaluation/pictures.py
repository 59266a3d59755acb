"""Scored samples to look at: which are kept, which are shown, and the folder they lie in.

    pictures/val/
      pictures.json           [{"group": "best", "file": "best-1.png", "name": …, "sentence": …, "iou": 0.93}, …]
      best-1.png …            sentence, photograph, truth, prediction, difference
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coupalign.errors import InputError
from coupalign.evaluation.metrics import ious
from coupalign.files import whole_directory, write_json
from coupalign.viz import sample_picture

if TYPE_CHECKING:
    from coupalign.evaluation.evaluator import Evaluation

LIST = "pictures.json"
_DRAWN = 4  # random pictures kept for one shown: the ones near the median come from them


@dataclass(frozen=True)
class Picture:
    """One scored sample to look at. `image` is uint8 [H, W, 3]; `truth` and `prediction` are bool [H, W]."""

    number: int
    name: str
    sentence: str
    iou: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


def choose_pictures(pictures: Sequence[Picture], rows: np.ndarray, many: int) -> dict[str, list[Picture]]:
    """Groups of at most `many` pictures for a page: {"random": …, "best": …, "median": …, "worst": …}.

    Best and worst are exact among the samples of the rank that kept the pictures; "random" is a fair draw from them, and
    "median" are those of a larger draw whose IoU is nearest to the median of `rows`. A picture may be in two groups,
    except that none is in both "random" and "median" where there are enough.
    """
    unique = list({picture.number: picture for picture in pictures}.values())
    ranked = sorted(unique, key=lambda picture: (picture.iou, picture.number))
    drawn = sorted(unique, key=_lot)[:_DRAWN * many]
    middle = float(np.median(ious(rows)))
    others = drawn[many:] or drawn
    near = sorted(others, key=lambda picture: (abs(picture.iou - middle), picture.number))
    return {"random": drawn[:many], "best": ranked[::-1][:many], "median": near[:many], "worst": ranked[:many]}


def _lot(picture: Picture) -> int:
    """A number drawn for each sample: the smallest lots of any samples are a fair and repeatable sample of them."""
    return (picture.number + 1) * 2654435761 % 2**32


def prune(shelf: list[Picture], many: int) -> list[Picture]:
    """Keep the best, the worst and a fair draw, which pruning again cannot bias: the memory is bounded."""
    ranked = sorted(shelf, key=lambda picture: (picture.iou, picture.number))
    ends = {picture.number for picture in ranked[:many] + ranked[max(0, len(ranked) - many):]}
    drawn = {picture.number for picture in sorted(shelf, key=_lot)[:_DRAWN * many]}
    return [picture for picture in shelf if picture.number in ends | drawn]



def keep_pictures(folder: Path, evaluation: Evaluation, many: int) -> list[Path]:
    """Draw the chosen pictures of an evaluation into `folder`, which is replaced as a whole; returns the files."""
    groups = choose_pictures(evaluation.pictures, evaluation.rows, many)
    listed = []
    with whole_directory(folder) as partial:
        for group, pictures in groups.items():
            for place, picture in enumerate(pictures, 1):
                file = f"{group}-{place}.png"
                drawn = sample_picture(picture.image, picture.sentence, picture.truth, picture.prediction, picture.name)
                drawn.save(partial / file)
                listed.append({"group": group, "file": file, "name": picture.name, "sentence": picture.sentence,
                               "iou": round(picture.iou, 6)})
        write_json(partial / LIST, listed)
    return [folder / entry["file"] for entry in listed]


def read_pictures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The list of a folder of `keep_pictures` by group, in its order; empty where there is no such folder.

    Raises:
        InputError: the list is damaged, or a file of it is missing.
    """
    path = folder / LIST
    if not path.is_file():
        return {}
    groups: dict[str, list[dict[str, Any]]] = {}
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            known = {"file": str(entry["file"]), "name": str(entry["name"]), "sentence": str(entry["sentence"]),
                     "iou": float(entry["iou"])}
            groups.setdefault(str(entry["group"]), []).append(known)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: damaged ({error}); score with --pictures again") from None
    missing = [entry["file"] for group in groups.values() for entry in group if not (folder / entry["file"]).is_file()]
    if missing:
        raise InputError(f"{folder / missing[0]}: listed in {LIST} but not there; score with --pictures again")
    return groups
