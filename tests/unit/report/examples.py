"""A small run directory, made by the code that makes real ones.

It has hostile text wherever a page quotes something.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from coupalign.evaluation.evaluator import Evaluation
from coupalign.evaluation.metrics import METRICS, Score, summarize
from coupalign.evaluation.rows import Rows, rows_path, write_rows
from coupalign.evaluation.shelf import Picture
from coupalign.files import write_json
from coupalign.report.pictures import save_pictures

EVIL = "<script>alert(\"1 & 2\")</script> 'red' {body} star"
SENTENCES = (
    EVIL,
    "left one",
    "the second big blue circle from the left",
    "man",
    "a cup on the table close to </script><b>you",
    "dark dog",
    "last person in the back row who wears a hat",
    "star --> <!-- ]]> &amp;",
)


def score_of(
    protocol: str = "ris-v1",
    intersection: int = 70,
    blind: bool = True,
    sentences: str = "each",
) -> Score:
    """The score of eight samples with a union of 100 pixels each."""
    counts = [(n, intersection + n, 100, intersection // 2, 100) for n in range(8)]
    summary = summarize(np.asarray(counts, dtype=np.int64), bootstrap=20)
    return Score(
        protocol=protocol,
        metrics={name: summary[name] for name in METRICS},
        samples=summary["samples"],
        images=summary["images"],
        intervals=summary["intervals"],
        conditions={"threshold": "p > 0.5 <b>", "truth": "original resolution"},
        fingerprint="cd" * 32,
        language_blind=score_of(protocol, 10, blind=False) if blind else None,
        sentences=sentences,
    )


def evaluation_of(samples: int = 8, size: tuple[int, int] = (40, 60)) -> Evaluation:
    """Discs as truths, shifted a little as predictions; sample n has sentence n of `SENTENCES`."""
    random = np.random.default_rng(0)
    height, width = size
    y, x = np.mgrid[:height, :width]

    pictures, rows = [], []
    for number in range(samples):
        radius, shift = 0.05 + 0.04 * number, random.integers(0, 4)
        truth = np.hypot(y / height - 0.5, x / width - 0.5) < radius
        prediction = np.hypot(y / height - 0.5, (x - shift) / width - 0.5) < radius

        intersection, union = int((truth & prediction).sum()), int((truth | prediction).sum())
        same_class = number % 5 - 1
        counts = (number, intersection, union, intersection // 2, union)
        rows.append((*counts, number // 2, int(truth.sum()), truth.size, same_class))
        pictures.append(
            Picture(
                number=number,
                name=f"refshapes/none/{number}/1",
                sentence=SENTENCES[number % len(SENTENCES)],
                iou=intersection / union,
                image=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
                truth=truth,
                prediction=prediction,
                same_class=same_class,
            )
        )
    return Evaluation(None, np.asarray(rows, dtype=np.int64), tuple(pictures))


def rows_of(evaluation: Evaluation) -> Rows:
    texts = [(picture.name, picture.sentence) for picture in evaluation.pictures]
    return Rows.from_integers(evaluation.rows, texts)


def write_metrics(path: Path, steps: int = 300) -> None:
    lines = []
    for step in range(10, steps + 1, 10):
        metrics = {"train/loss": 3 / step**0.3, "train/mask": 2 / step**0.3, "train/lr": 1e-4}
        if step % 100 == 0:
            metrics |= {"eval/val/oIoU": step / 500, "eval/val/P@0.5": step / 400}
        lines.append(json.dumps({"step": step, "time": 1.0 + step, "metrics": metrics}) + "\n")
    path.write_text("".join(lines))


def write_run(folder: Path, per_group: int = 2) -> Path:
    """Write a run: scores, rows of one, curves, pictures with explanations, and a config."""
    of_training = score_of(intersection=60, blind=False)
    write_json(folder / "scores" / "val.json", {"step": 300, **of_training.to_json()})
    write_json(
        folder / "scores" / "val-ris-v1.json",
        {"checkpoint": "step-00000300", **score_of().to_json()},
    )
    other = score_of("lavt", blind=False, sentences="first")
    write_json(folder / "scores" / "val-lavt-first.json", other.to_json())

    evaluation = evaluation_of()
    write_rows(rows_path(folder, "val", "ris-v1"), rows_of(evaluation))
    write_metrics(folder / "metrics.jsonl")
    save_pictures(
        folder / "pictures" / "val",
        evaluation,
        per_group,
        explain=lambda picture: Image.fromarray(picture.image),
        explained_per_group=1,
    )
    (folder / "config.yaml").write_text(f"name: demo # {EVIL}\n")
    return folder
