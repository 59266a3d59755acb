"""A small run directory, made by the code that makes real ones, with hostile words wherever a page quotes something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from coupalign.evaluation.evaluator import Evaluation
from coupalign.evaluation.metrics import Score, summarize
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
    protocol: str = "ris-v1", inside: int = 70, blind: bool = True, sentences: str = "each"
) -> Score:
    rows = np.asarray(
        [[number, inside + number, 100, inside // 2, 100] for number in range(8)], dtype=np.int64
    )
    values = summarize(rows, bootstrap=20)
    samples, images, intervals = (
        values.pop("samples"),
        values.pop("images"),
        values.pop("intervals"),
    )
    conditions = {"threshold": "p > 0.5 <b>", "truth": "original resolution"}
    other = score_of(protocol, 10, False) if blind else None
    return Score(
        protocol=protocol,
        metrics=values,
        samples=samples,
        images=images,
        intervals=intervals,
        conditions=conditions,
        fingerprint="cd" * 32,
        language_blind=other,
        sentences=sentences,
    )


def evaluation_of(many: int = 8, size: tuple[int, int] = (40, 60)) -> Evaluation:
    """Discs as truths, moved a little as predictions; sentence n of `SENTENCES` belongs to sample n."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    pictures, rows = [], []
    for number in range(many):
        radius, moved = 0.05 + 0.04 * number, random.integers(0, 4)
        truth, prediction = (
            np.hypot(y / size[0] - 0.5, (x - shift) / size[1] - 0.5) < radius
            for shift in (0, moved)
        )
        inside, union = int((truth & prediction).sum()), int((truth | prediction).sum())
        rows.append(
            (
                number,
                inside,
                union,
                inside // 2,
                union,
                number // 2,
                int(truth.sum()),
                truth.size,
                number % 5 - 1,
            )
        )
        image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        name, sentence = f"refshapes/none/{number}/1", SENTENCES[number % len(SENTENCES)]
        pictures.append(
            Picture(
                number=number,
                name=name,
                sentence=sentence,
                iou=inside / union,
                image=image,
                truth=truth,
                prediction=prediction,
                same_class=number % 5 - 1,
            )
        )
    return Evaluation(None, np.asarray(rows, dtype=np.int64), tuple(pictures))


def rows_of(evaluation: Evaluation) -> Rows:
    return Rows.from_integers(
        evaluation.rows, [(picture.name, picture.sentence) for picture in evaluation.pictures]
    )


def write_metrics(path: Path, steps: int = 300) -> None:
    lines = []
    for step in range(10, steps + 1, 10):
        metrics = {"train/loss": 3 / step**0.3, "train/mask": 2 / step**0.3, "train/lr": 1e-4}
        if step % 100 == 0:
            metrics |= {"eval/val/oIoU": step / 500, "eval/val/P@0.5": step / 400}
        lines.append(json.dumps({"step": step, "time": 1.0 + step, "metrics": metrics}) + "\n")
    path.write_text("".join(lines))


def write_run(folder: Path, many: int = 2) -> Path:
    """Scores of training and of two protocols, rows of one, curves, pictures with explanations, and a configuration."""
    write_json(
        folder / "scores" / "val.json", {"step": 300, **score_of(inside=60, blind=False).to_json()}
    )
    write_json(
        folder / "scores" / "val-ris-v1.json",
        {"checkpoint": "step-00000300", **score_of().to_json()},
    )
    write_json(
        folder / "scores" / "val-lavt-first.json",
        score_of("lavt", blind=False, sentences="first").to_json(),
    )
    evaluation = evaluation_of()
    write_rows(rows_path(folder, "val", "ris-v1"), rows_of(evaluation))
    write_metrics(folder / "metrics.jsonl")
    save_pictures(
        folder / "pictures" / "val",
        evaluation,
        many,
        explain=lambda picture: Image.fromarray(picture.image),
        explained_per_group=1,
    )
    (folder / "config.yaml").write_text(f"name: demo # {EVIL}\n")
    return folder
