"""Generate RefShapes, the test bed and demo of the project, in the layout of RefCOCO.

    OUT/images/train2014/COCO_train2014_000000000001.jpg …
    OUT/refcoco/instances.json      COCO annotations; `info` has the parameters of the set
    OUT/refcoco/refs(unc).p         the list of refs, as in the `refer` toolbox

The splits follow the image number: 80 % train, 10 % val, 5 % testA, 5 % testB. As in RefCOCO, testA
and testB differ in their targets: testA refers to circles only, testB never to a circle. About 5 %
of the pictures are gray; their sentences have no color words.

Each picture depends only on the seed, its number, its split, the level and the size. So the bytes
do not depend on the number of workers.
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
from tabulate import tabulate
from tqdm import tqdm

from coupalign import files
from coupalign.data.refshapes.drawing import SHAPES, trace_polygons
from coupalign.data.refshapes.scenes import LEVELS, compose
from coupalign.errors import InputError, RunError

VERSION = 2
DESCRIPTION = "RefShapes: generated scenes, neither RefCOCO nor photographs"
SPLITS = ("train", "val", "testA", "testB")
JPEG_QUALITY = 90
MIN_IMAGES_FOR_WORKERS = 64  # with fewer, starting processes takes longer than it saves


@dataclass(frozen=True)
class SynthReport:
    """The contents of a RefShapes folder."""

    out: Path
    parameters: dict[str, Any]
    counts: dict[str, dict[str, int]]  # counts[split] has "images", "refs" and "sentences"
    existed: bool  # nothing was written

    def table(self) -> str:
        parameters = ", ".join(f"{key} {value}" for key, value in self.parameters.items())
        kinds = ("images", "refs", "sentences")
        rows = []
        for split, numbers in self.counts.items():
            rows.append((split, *(f"{numbers[kind]:,}" for kind in kinds)))

        counts = tabulate(
            rows,
            headers=("split", *kinds),
            tablefmt="plain",
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )
        outcome = "already there" if self.existed else "written"
        return f"RefShapes {parameters}\n{counts}\n{outcome}: {self.out}"

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
    """Write a RefShapes data set; a finished one with the same parameters is left as it is.

    Args:
        out: the root folder; it appears complete or not at all.
        images: number of pictures.
        level: "easy" (attributes and sides) or "hard" (also relations and order, more objects).
        size: side of the pictures, in pixels.
        workers: number of processes; it does not change the result.

    Raises:
        InputError: an argument is out of range, or `out` contains something else or cannot be
            written.
        RunError: the disk is full or failed.
    """
    out = Path(out)
    _check_arguments(images=images, seed=seed, level=level, size=size, workers=workers)
    parameters = {"version": VERSION, "images": images, "seed": seed, "level": level, "size": size}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _report_existing(out, parameters)

    files.require_writable(out.parent, "the data set", "Choose another folder")
    try:
        counts = _write_set(out, parameters, workers, progress=progress)
    except BrokenPipeError:  # of the progress bar
        raise
    except OSError as error:
        raise RunError(
            f"{out}: cannot be written: {error.strerror or error}; nothing is kept. Free space or "
            "choose another folder, then start the same command again"
        ) from error
    return SynthReport(out, parameters, counts, existed=False)


def _write_set(
    out: Path, parameters: dict[str, Any], workers: int, *, progress: bool
) -> dict[str, dict[str, int]]:
    """Write all files and return their counts."""
    images, seed = parameters["images"], parameters["seed"]
    level, size = parameters["level"], parameters["size"]

    # Pictures first: the ids of the annotations depend on all of them.
    splits = assign_splits(images)
    with files.whole_directory(out) as folder:
        picture_folder = folder / "images" / "train2014"
        picture_folder.mkdir(parents=True)
        write = partial(write_scene, picture_folder, seed=seed, level=level, size=size)
        written = _map_in_order(write, splits, workers)
        bar = tqdm(written, total=images, desc="RefShapes", unit="scene", disable=not progress)
        return _write_annotations(folder / "refcoco", list(bar), splits, parameters)


def assign_splits(images: int) -> list[str]:
    """Return the split of image 1, 2, …: 80/10/5/5 %.

    With four images or more, every split has at least one.
    """
    shares = (("val", 0.1), ("testA", 0.05), ("testB", 0.05))
    counts = {split: max(1, round(share * images)) for split, share in shares}
    train = max(1, images - sum(counts.values()))

    splits = ["train"] * train
    for split, count in counts.items():
        splits += [split] * count
    return splits[:images]


def write_scene(
    folder: Path, number: int, split: str, *, seed: int, level: str, size: int
) -> dict[str, Any]:
    """Generate one scene, write its JPEG and return its annotations.

    Returns:
        The objects and refs as plain values, without ids.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, number]))
    scene = compose(rng, LEVELS[level], size, split)
    scene.picture.save(folder / _file_name(number), quality=JPEG_QUALITY)

    objects = []
    for item, mask in zip(scene.objects, scene.masks):
        objects.append(
            {
                "segmentation": trace_polygons(mask),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "bbox": _bounding_box(mask),
                "category_id": SHAPES.index(item.shape) + 1,
            }
        )
    return {"objects": objects, "refs": scene.refs}


def _bounding_box(mask: np.ndarray) -> list[int]:
    """Return x, y, width and height of the set pixels."""
    ys, xs = np.nonzero(mask)
    left, top = int(xs.min()), int(ys.min())
    return [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top]


def _check_arguments(*, images: int, seed: int, level: str, size: int, workers: int) -> None:
    if level not in LEVELS:
        raise InputError(f"synth: unknown level {level!r}; choose one of {', '.join(LEVELS)}")
    for name, value, minimum in (
        ("images", images, 1),
        ("seed", seed, 0),
        ("size", size, 48),
        ("workers", workers, 0),
    ):
        if value < minimum:
            raise InputError(f"synth: {name} is {value}; it must be at least {minimum}")


def _report_existing(out: Path, parameters: dict[str, Any]) -> SynthReport:
    """Report a finished folder with the same parameters; refuse anything else at `out`."""
    # A folder without readable parameters is not one of ours.
    try:
        info = json.loads((out / "refcoco" / "instances.json").read_text())["info"]
        existing = {key: info[key] for key in parameters}
    except (OSError, ValueError, KeyError, TypeError):
        info, existing = {}, {}

    if info.get("description") != DESCRIPTION:
        raise InputError(
            f"{out} exists and is not a RefShapes folder; choose another folder or remove it"
        )
    if existing != parameters:
        differences = [
            f"{key} is {existing[key]}, not {value}"
            for key, value in parameters.items()
            if existing[key] != value
        ]
        raise InputError(
            f"{out} contains another RefShapes set ({'; '.join(differences)}); "
            "choose another folder or remove it"
        )
    return SynthReport(out, parameters, info["counts"], existed=True)


def _map_in_order(write: Any, splits: list[str], workers: int) -> Iterator[dict[str, Any]]:
    """Yield the annotations of the scenes in the order of their numbers."""
    numbers = range(1, len(splits) + 1)
    if workers <= 1 or len(splits) < MIN_IMAGES_FOR_WORKERS:
        yield from map(write, numbers, splits)
        return

    # Spawned, because a forked child of a parent with threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(write, numbers, splits, chunksize=32)


# ----------------------------------------------------------------------------------- Annotations


def _write_annotations(
    folder: Path, scenes: list[dict[str, Any]], splits: list[str], parameters: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Write instances.json and refs(unc).p, and return the counts per split."""
    annotations = _number_annotations(scenes)
    refs = _number_refs(scenes, splits)
    counts = {split: {"images": splits.count(split), "refs": 0, "sentences": 0} for split in SPLITS}
    for ref in refs:
        counts[ref["split"]]["refs"] += 1
        counts[ref["split"]]["sentences"] += len(ref["sentences"])

    side = parameters["size"]
    pictures = [
        {"id": number, "file_name": _file_name(number), "height": side, "width": side}
        for number in range(1, len(scenes) + 1)
    ]
    categories = [
        {"supercategory": "shape", "id": number, "name": name}
        for number, name in enumerate(SHAPES, start=1)
    ]
    instances = {
        "info": {"description": DESCRIPTION, **parameters, "counts": counts},
        "images": pictures,
        "annotations": annotations,
        "categories": categories,
    }

    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps(instances, separators=(",", ":")))
    # Pickle writes shared strings differently from equal ones, and worker processes share none.
    # Going through JSON first makes the bytes the same for any number of workers.
    unshared = json.loads(json.dumps(refs))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(unshared, protocol=2))
    return counts


def _number_annotations(scenes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the annotations of all scenes, with ids in image order."""
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        for item in scene["objects"]:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **item})
    return annotations


def _number_refs(scenes: list[dict[str, Any]], splits: list[str]) -> list[dict[str, Any]]:
    """Return the entries of refs(unc).p, with ids in image order."""
    refs: list[dict[str, Any]] = []
    first_annotation, first_sentence = 1, 0
    for image_id, (scene, split) in enumerate(zip(scenes, splits), start=1):
        for ref in scene["refs"]:
            sentences = _number_sentences(ref["sentences"], first_sentence)
            first_sentence += len(sentences)

            ann_id = first_annotation + ref["object"]
            stem = _file_name(image_id).removesuffix(".jpg")
            refs.append(
                {
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    # As in RefCOCO, this is the name of the picture with the annotation id.
                    "file_name": f"{stem}_{ann_id}.jpg",
                    "ann_id": ann_id,
                    "ref_id": len(refs) + 1,
                    "image_id": image_id,
                    "split": split,
                    "sentences": sentences,
                    "category_id": scene["objects"][ref["object"]]["category_id"],
                }
            )
        first_annotation += len(scene["objects"])
    return refs


def _number_sentences(texts: list[list[str]], first_id: int) -> list[dict[str, Any]]:
    return [
        {"tokens": sent.split(), "raw": raw, "sent": sent, "sent_id": sent_id}
        for sent_id, (raw, sent) in enumerate(texts, start=first_id)
    ]


def _file_name(number: int) -> str:
    return f"COCO_train2014_{number:012d}.jpg"
