"""RefShapes: generated scenes and sentences in the very layout of RefCOCO, the project's test bed and demo.

    OUT/images/train2014/COCO_train2014_000000000001.jpg …
    OUT/refcoco/instances.json      COCO form; `info` says that it is RefShapes, with seed, level and size
    OUT/refcoco/refs(unc).p         the list of refs of the `refer` toolbox

Splits follow the image number: 80 % train, 10 % val, 5 % testA, 5 % testB. As in RefCOCO, testA and testB differ in what
is referred to: only circles in testA, never a circle in testB. About 5 % of the pictures are gray and have no color words.

Each picture depends on (seed, its number, its split, level, size) only, so the bytes do not depend on the worker count.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from coupalign import files
from coupalign.data.refshapes.drawing import SHAPES, trace
from coupalign.data.refshapes.scenes import LEVELS, compose
from coupalign.errors import InputError

VERSION = 2
DESCRIPTION = "RefShapes: generated scenes, neither RefCOCO nor photographs"
SPLITS = ("train", "val", "testA", "testB")
JPEG_QUALITY = 90


@dataclass(frozen=True)
class SynthReport:
    """What lies in a RefShapes folder. `counts[split]` has "images", "refs" and "sentences"; `existed`: nothing was written."""

    out: Path
    parameters: dict[str, Any]
    counts: dict[str, dict[str, int]]
    existed: bool

    def table(self) -> str:
        lines = [f"{'split':8}{'images':>8}{'refs':>8}{'sentences':>11}"]
        lines += [
            f"{split:8}{c['images']:>8,}{c['refs']:>8,}{c['sentences']:>11,}"
            for split, c in self.counts.items()
        ]
        title = "RefShapes " + ", ".join(f"{key} {value}" for key, value in self.parameters.items())
        return "\n".join(
            [title, *lines, f"{'already there' if self.existed else 'written'}: {self.out}"]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            **self.parameters,
            "counts": self.counts,
            "existed": self.existed,
        }


def synth(
    out: Path,
    images: int,
    seed: int,
    level: str = "easy",
    size: int = 96,
    workers: int = 2,
    progress: bool = True,
) -> SynthReport:
    """Write a RefShapes data set; a finished one of the same parameters is left as it is.

    Args:
        out: the root folder; it appears whole or not at all.
        images, seed, level, size: the data set; `level` is "easy" (attributes and places) or "hard" (also relations and
            order, more objects), `size` the side of the pictures in pixels.
        workers: processes; they do not change the result.
    Raises:
        InputError: an argument out of range, or `out` holds something else.
    """
    out = Path(out)
    if level not in LEVELS:
        raise InputError(f"synth: unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    for name, value, least in (
        ("images", images, 1),
        ("seed", seed, 0),
        ("size", size, 48),
        ("workers", workers, 0),
    ):
        if value < least:
            raise InputError(f"synth: {name} is {value}; it must be at least {least}")
    parameters = {"version": VERSION, "images": images, "seed": seed, "level": level, "size": size}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _existing(out, parameters)
    splits = assign_splits(images)
    with files.whole_directory(out) as folder:
        picture_folder = folder / "images" / "train2014"
        picture_folder.mkdir(parents=True)
        make = partial(write_scene, picture_folder, seed, level, size)
        scenes = list(
            tqdm(
                _mapped(make, splits, workers),
                total=images,
                desc="RefShapes",
                unit="scene",
                disable=not progress,
            )
        )
        counts = _write_annotations(folder / "refcoco", scenes, splits, parameters)
    return SynthReport(out, parameters, counts, existed=False)


def assign_splits(images: int) -> list[str]:
    """The split of image 1, 2, …: 80/10/5/5 %, at least one image each where there are four."""
    others = {
        split: max(1, round(share * images))
        for split, share in (("val", 0.1), ("testA", 0.05), ("testB", 0.05))
    }
    train = max(1, images - sum(others.values()))
    return (["train"] * train + [split for split, count in others.items() for _ in range(count)])[
        :images
    ]


def write_scene(
    folder: Path, seed: int, level: str, size: int, numbered_split: tuple[int, str]
) -> dict[str, Any]:
    """Generate one scene, write its JPEG, return its annotations as plain values (without ids)."""
    number, split = numbered_split
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    picture, masks, things, refs = compose(rng, LEVELS[level], size, split)
    picture.save(folder / _file_name(number), quality=JPEG_QUALITY)
    objects = []
    for thing, mask in zip(things, masks):
        ys, xs = np.nonzero(mask)
        box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
        objects.append(
            {
                "segmentation": trace(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "bbox": box,
                "category_id": SHAPES.index(thing.shape) + 1,
            }
        )
    return {"objects": objects, "refs": refs}


def _mapped(make: Any, splits: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """The scenes in order; spawned processes, since a forked child of a threaded parent can hang."""
    tasks = list(enumerate(splits, start=1))
    if workers <= 1 or len(tasks) < 64:
        yield from map(make, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, tasks, chunksize=32)


def _file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"


def _write_annotations(
    folder: Path, scenes: list[dict[str, Any]], splits: list[str], parameters: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Give ids in image order, write instances.json and refs(unc).p, return the counts per split."""
    side = parameters["size"]
    pictures = [
        {"id": number, "file_name": _file_name(number), "height": side, "width": side}
        for number in range(1, len(scenes) + 1)
    ]
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    counts = {split: {"images": splits.count(split), "refs": 0, "sentences": 0} for split in SPLITS}
    sent_id = 0
    for number, (scene, split) in enumerate(zip(scenes, splits), start=1):
        first = len(annotations) + 1
        annotations += [
            {"id": first + k, "image_id": number, **thing}
            for k, thing in enumerate(scene["objects"])
        ]
        for ref in scene["refs"]:
            refs.append(
                _ref(
                    len(refs) + 1,
                    annotations[first + ref["object"] - 1],
                    split,
                    ref["sentences"],
                    sent_id,
                )
            )
            sent_id += len(ref["sentences"])
            counts[split]["refs"] += 1
            counts[split]["sentences"] += len(ref["sentences"])
    info = {"description": DESCRIPTION, **parameters, "counts": counts}
    categories = [
        {"supercategory": "shape", "id": number, "name": name}
        for number, name in enumerate(SHAPES, start=1)
    ]
    instances = {
        "info": info,
        "images": pictures,
        "annotations": annotations,
        "categories": categories,
    }
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")))
    # Through JSON first: pickle writes shared and equal strings differently, and worker processes share none.
    (folder / "refs(unc).p").write_bytes(pickle.dumps(json.loads(json.dumps(refs)), protocol=2))
    return counts


def _ref(
    ref_id: int, annotation: dict[str, Any], split: str, texts: list[list[str]], first_sentence: int
) -> dict[str, Any]:
    """One entry of refs(unc).p; like RefCOCO's, its `file_name` is the picture's with the annotation id as a suffix."""
    sentences = [
        {"tokens": sent.split(), "raw": raw, "sent": sent, "sent_id": first_sentence + k}
        for k, (raw, sent) in enumerate(texts)
    ]
    number, ann_id = annotation["image_id"], annotation["id"]
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"{_file_name(number)[:-4]}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": number,
        "split": split,
        "sentences": sentences,
        "category_id": annotation["category_id"],
    }


def _existing(out: Path, parameters: dict[str, Any]) -> SynthReport:
    """The report of a finished folder of the same parameters; everything else at `out` is refused."""
    try:
        info = json.loads((out / "refcoco" / "instances.json").read_text())["info"]
        there = {key: info[key] for key in parameters}
    except (OSError, ValueError, KeyError, TypeError):
        info, there = {}, {}
    if info.get("description") != DESCRIPTION:
        raise InputError(
            f"{out} exists and is not a RefShapes folder; choose another place or remove it"
        )
    if there != parameters:
        differing = [
            f"{key} {there[key]} there, {value} asked for"
            for key, value in parameters.items()
            if there[key] != value
        ]
        raise InputError(
            f"{out} holds another RefShapes set ({'; '.join(differing)}); choose another place or remove it"
        )
    return SynthReport(out, parameters, info["counts"], existed=True)
