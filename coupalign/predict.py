"""A trained model at work: one photograph and a sentence, or a file of many pairs, to masks.

    predictor = Predictor.from_checkpoint("runs/demo")
    prediction = predictor.predict("photo.jpg", "the small red star")

A file of pairs is CSV with the columns `image` and `sentence`, or JSONL with those keys; images are found relative to the
file. For the n-th pair, counted from 1, the output folder gets

    <image stem>-<n>.mask.png      0 and 255, the photograph's size
    <image stem>-<n>.overlay.png   the mask on the photograph
    results.jsonl                  one line a pair: what `Prediction.to_json` says, and where the files are
"""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from coupalign.config.schema import Config
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import frame_of, image_to_square
from coupalign.engine.restore import open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.protocols import logits_at_original_size
from coupalign.files import whole_file
from coupalign.model.referring import ReferringModel
from coupalign.viz import overlay, save_png

Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What a sentence refers to in a photograph of H x W pixels.

    Attributes:
        mask: bool [H, W], probability above 0.5.
        probability: float32 [H, W].
        box: (x0, y0, x1, y1) around the mask, pixels, x1 and y1 exclusive; None where the mask is empty.
        area: pixels of the mask.
        score: mean probability inside the mask, 0 where it is empty. Not calibrated.
        cut: the sentence was longer than the model's token limit; its end was not read.
    """

    sentence: str
    mask: np.ndarray
    probability: np.ndarray
    box: tuple[int, int, int, int] | None
    area: int
    score: float
    cut: bool

    def to_json(self) -> dict[str, Any]:
        """The prediction without its pixels."""
        height, width = self.mask.shape
        return {"sentence": self.sentence, "box": None if self.box is None else list(self.box), "area": self.area,
                "score": round(self.score, 6), "height": height, "width": width, "cut": self.cut}


class Pair(NamedTuple):
    """One line of a file of pairs: `place` names file and line for messages, `given` is the image as the file has it."""

    place: str
    given: str
    image: Path
    sentence: str


class Predictor:
    """A model in evaluation mode with its tokenizer, fp32."""

    def __init__(self, config: Config, model: ReferringModel, tokenizer: Tokenizer, device: torch.device) -> None:
        self.config, self.model, self.tokenizer, self.device = config, model.eval().to(device), tokenizer, device

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | None = None) -> Predictor:
        """Read a run directory (its best checkpoint, else its newest) or one checkpoint directory.

        Args:
            device: "cpu", "cuda", "cuda:1" …; none: the GPU where there is one.

        Raises:
            InputError: no checkpoint there, or its weights are those of another model.
        """
        place = _device(device)
        return cls(*open_checkpoint(path, place), place)

    def predict(self, image: Picture, sentence: str) -> Prediction:
        """What `sentence` refers to in `image`: a path, a PIL image, or uint8 [H, W, 3] (RGB) or [H, W] (gray).

        An image from a file is turned upright as its EXIF orientation says.

        Raises:
            InputError: no such image, not an image, or no words in the sentence.
        """
        return self._predict_batch([open_image(image)], [sentence])[0]

    def predict_many(self, pairs: Iterable[tuple[Picture, str]], batch: int = 8) -> Iterator[Prediction]:
        """Predictions for (image, sentence) pairs, in their order, `batch` of them at a time."""
        rest = iter(pairs)
        while chunk := list(islice(rest, batch)):
            yield from self._predict_batch([open_image(image) for image, _ in chunk], [sentence for _, sentence in chunk])

    def predict_to(self, image: Path, sentence: str, output: Path) -> dict[str, Any]:
        """Predict one pair, write <image stem>.mask.png and .overlay.png into `output`, return what results.jsonl would say."""
        opened = open_image(image)
        prediction = self._predict_batch([opened], [sentence])[0]
        files = write_prediction(Path(output), Path(image).stem, opened, prediction)
        return {"image": str(image), **prediction.to_json(), **files}

    def predict_file(self, pairs: Path, output: Path, batch: int = 8) -> list[dict[str, Any]]:
        """Predict every pair of a CSV or JSONL file and write masks, overlays and results.jsonl into `output`.

        Returns:
            the lines of results.jsonl.

        Raises:
            InputError: names the file and the line; all lines are looked at first, and results.jsonl is written last.
        """
        rest, results = iter(read_pairs(Path(pairs))), []
        while chunk := list(islice(rest, batch)):
            images = [_open_pair(pair) for pair in chunk]
            for pair, image, prediction in zip(chunk, images, self._predict_batch(images, [pair.sentence for pair in chunk])):
                files = write_prediction(Path(output), f"{pair.image.stem}-{len(results) + 1}", image, prediction)
                results.append({"image": pair.given, **prediction.to_json(), **files})
        with whole_file(Path(output) / "results.jsonl", "w") as file:
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        return results

    @torch.inference_mode()
    def _predict_batch(self, images: list[Image.Image], sentences: list[str]) -> list[Prediction]:
        data = self.config.data
        frames = [frame_of(image.height, image.width, data.image_size, data.resize) for image in images]
        squares = np.stack([image_to_square(np.asarray(image), frame) for image, frame in zip(images, frames)])  # [B, S, S, 3]
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(self.device)
        words, word_mask, cut = self.tokenizer.encode([_tidy(sentence) for sentence in sentences], data.max_tokens)
        logits = self.model(pixels, words.to(self.device), word_mask.to(self.device))
        return [_prediction(logits_at_original_size(one, frame), sentence, was_cut)
                for one, frame, sentence, was_cut in zip(logits, frames, sentences, cut)]


# --------------------------------------------------------------------------------------------------------- files


def write_prediction(folder: Path, name: str, image: Picture, prediction: Prediction) -> dict[str, str]:
    """Write <name>.mask.png and <name>.overlay.png into `folder`; returns their names, {"mask": …, "overlay": …}."""
    files = {"mask": f"{name}.mask.png", "overlay": f"{name}.overlay.png"}
    save_png(folder / files["mask"], Image.fromarray(prediction.mask.astype(np.uint8) * 255))
    save_png(folder / files["overlay"], Image.fromarray(overlay(np.asarray(open_image(image)), prediction.mask)))
    return files


def read_pairs(path: Path) -> list[Pair]:
    """Read (image, sentence) pairs from a .csv or .jsonl file.

    Raises:
        InputError: names the file and the line: a column, an image or a sentence is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    match path.suffix.lower():
        case ".csv":
            rows = _csv_rows(path, text)
        case ".jsonl" | ".ndjson":
            rows = _json_rows(path, text)
        case other:
            raise InputError(f"{path}: pairs are read from .csv or .jsonl, not from {other or 'a file without ending'}")
    pairs = [_pair(path, line, row) for line, row in rows]
    if not pairs:
        raise InputError(f"{path}: holds no pairs")
    return pairs


def open_image(image: Picture) -> Image.Image:
    """Any kind of `Picture` as an upright RGB image.

    Raises:
        InputError: no such file, not an image, or an array of another type or shape.
    """
    match image:
        case Image.Image():
            return ImageOps.exif_transpose(image).convert("RGB")
        case np.ndarray():
            if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3):
                found = f"{image.dtype} {list(image.shape)}"
                raise InputError(f"image array {found}: uint8 [H, W, 3] (RGB) or [H, W] (gray) is expected")
            return Image.fromarray(image).convert("RGB")
    try:
        return ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: cannot be read as an image: {error}") from None


# ----------------------------------------------------------------------------------------------- the small print


def _prediction(logits: torch.Tensor, sentence: str, cut: bool) -> Prediction:
    mask, probability = (logits > 0).cpu().numpy(), torch.sigmoid(logits).cpu().numpy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None
    score = float(probability[mask].mean(dtype=np.float64)) if len(rows) else 0.0
    return Prediction(sentence, mask, probability, box, int(mask.sum()), score, cut)


def _tidy(sentence: str) -> str:
    """One line without the punctuation at its end, which the sentences of the data sets do not have."""
    tidy = " ".join(sentence.split()).rstrip(" .!?,;:")
    if not tidy:
        raise InputError(f"sentence {sentence!r}: holds no words; say which object is meant")
    return tidy


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device {name!r}: cpu, cuda or cuda:N is expected") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: this host shows {torch.cuda.device_count()} GPUs")
    return device


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    if missing := [name for name in ("image", "sentence") if name not in columns]:
        raise InputError(f"{path}: line 1: no column {' and '.join(missing)}; the columns are {','.join(columns)}")
    for row in reader:
        if None in row:
            raise InputError(f"{path}: line {reader.line_num}: more fields than columns; a sentence with a comma needs quotes")
        yield reader.line_num, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: an object with image and sentence is expected, found {line.strip()[:40]}")
        yield number, row


def _pair(path: Path, line: int, row: dict[str, Any]) -> Pair:
    place = f"{path}: line {line}"
    for name in ("image", "sentence"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{place}: the {name} is missing")
    image = path.parent / row["image"].strip()
    if not image.is_file():
        raise InputError(f"{place}: no such image: {image}")
    try:
        _tidy(row["sentence"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return Pair(place, row["image"].strip(), image, row["sentence"])


def _open_pair(pair: Pair) -> Image.Image:
    try:
        return open_image(pair.image)
    except InputError as error:
        raise InputError(f"{pair.place}: {error}") from None
