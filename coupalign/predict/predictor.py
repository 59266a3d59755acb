"""A trained model at work: one photograph and a sentence, or a file of many pairs, to masks.

    predictor = Predictor.from_checkpoint("runs/demo")
    prediction = predictor.predict("photo.jpg", "the small red star")

A file of pairs is CSV with the columns `image` and `sentence`, or JSONL with those keys; images are found relative to the file. A folder
is all of its images with one sentence. The output folder gets

    <name>.mask.png      0 and 255, the photograph's size
    <name>.overlay.png   the mask on the photograph
    results.jsonl        written last, a line a pair: what `Prediction.to_json` says and where the files are, or an `error`

where <name> is <image stem>-<n> for the n-th pair of a file, counted from 1, and <image stem> in a folder. Threads open the images of the
next batch and write the files of the one before while the model works. A file of pairs must be whole: an image that cannot be read ends
it, without results.jsonl. In a folder such an image is passed over, with a warning and its error in results.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from coupalign.config.schema import Config
from coupalign.data.batch import Frame
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import frame_of, image_to_square
from coupalign.engine.base import MixedPrecision
from coupalign.engine.open_checkpoint import open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.protocols import logits_at_original_size
from coupalign.evaluation.transfer import PendingCopy, start_copy
from coupalign.files import whole_file
from coupalign.model.base import ReferringModel
from coupalign.predict.requests import Request, folder_requests, read_requests, tidy
from coupalign.report.drawing import overlay, save_png

log = logging.getLogger(__name__)

T, R = TypeVar("T"), TypeVar("R")
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
        return {
            "sentence": self.sentence,
            "box": None if self.box is None else list(self.box),
            "area": self.area,
            "score": round(self.score, 6),
            "height": height,
            "width": width,
            "cut": self.cut,
        }


@dataclass(frozen=True)
class _Opened:
    """A pair as the model is asked it; `square` is uint8 [3, S, S]."""

    image: Image.Image
    sentence: str
    frame: Frame
    square: np.ndarray


@dataclass(frozen=True)
class _Asked:
    """A pair that the model has been asked; the answer is on its way from the device."""

    opened: _Opened
    mask: PendingCopy
    probability: PendingCopy
    cut: bool

    def prediction(self) -> Prediction:
        """The answer; waits for it."""
        mask, probability = self.mask.numpy(), self.probability.numpy()
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (
            (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            if len(rows)
            else None
        )
        score = float(probability[mask].mean(dtype=np.float64)) if len(rows) else 0.0
        return Prediction(
            self.opened.sentence, mask, probability, box, int(mask.sum()), score, self.cut
        )


class Predictor:
    """A model in evaluation mode with its tokenizer.

    It runs in the precision of its configuration (`precision: bf16` under autocast, on a CPU as on a GPU), which is the one that it was
    trained and scored in: so its masks are those that were scored.
    """

    def __init__(
        self, config: Config, model: ReferringModel, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.config, self.model, self.tokenizer, self.device = (
            config,
            model.eval().to(device),
            tokenizer,
            device,
        )
        self._net = MixedPrecision(self.model, config.precision).eval()

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
        return self._ask([self._open(image, sentence)])[0].prediction()

    def predict_many(
        self, pairs: Iterable[tuple[Picture, str]], batch: int = 8
    ) -> Iterator[Prediction]:
        """Predictions for (image, sentence) pairs, in their order, `batch` of them at a time.

        Pairs are taken up to three batches before their predictions are handed out.
        """
        with ThreadPoolExecutor(_threads()) as pool:
            opened = in_order(pool, lambda pair: self._open(*pair), pairs, batch)
            yield from in_order(pool, _Asked.prediction, self._asked(opened, batch), batch)

    def predict_to(self, image: Path, sentence: str, output: Path) -> dict[str, Any]:
        """Predict one pair, write <image stem>.mask.png and .overlay.png into `output`, return what results.jsonl would say."""
        [asked] = self._ask([self._open(image, sentence)])
        return _write(
            Request(str(image), str(image), Path(image), sentence, Path(image).stem),
            asked,
            Path(output),
        )

    def predict_file(self, pairs: Path, output: Path, batch: int = 8) -> list[dict[str, Any]]:
        """Predict every pair of a CSV or JSONL file and write masks, overlays and results.jsonl into `output`.

        Returns:
            the lines of results.jsonl.

        Raises:
            InputError: names the file and the line; all lines are looked at first, and results.jsonl is written last.
        """
        return self._predict_all(read_requests(Path(pairs)), Path(output), batch, self._open_line)

    def predict_folder(
        self, folder: Path, sentence: str, output: Path, batch: int = 8
    ) -> list[dict[str, Any]]:
        """Predict one sentence on every image of a folder and write masks, overlays and results.jsonl into `output`.

        Returns:
            the lines of results.jsonl, in the order of the images' names; one that cannot be read has an "error" and no files.

        Raises:
            InputError: no images there, no words in the sentence, or `output` is the folder itself.
        """
        folder, output = Path(folder), Path(output)
        pairs = folder_requests(folder, sentence)
        if output.resolve() == folder.resolve():
            raise InputError(
                f"{output}: masks among the images would be taken for images the next time; give another folder with --out"
            )
        return self._predict_all(pairs, output, batch, self._open_or_pass)

    def _predict_all(
        self,
        pairs: list[Request],
        output: Path,
        batch: int,
        open_pair: Callable[[Request], _Opened | InputError],
    ) -> list[dict]:
        with ThreadPoolExecutor(_threads()) as pool:
            asked = self._asked(in_order(pool, open_pair, pairs, batch), batch)
            lines = in_order(pool, lambda one: _write(*one, output), zip(pairs, asked), batch)
            results = list(
                tqdm(lines, desc="predicting", total=len(pairs), unit="image", leave=False)
            )
        with whole_file(output / "results.jsonl", "w") as file:
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        return results

    def _open(self, image: Picture, sentence: str) -> _Opened:
        opened = open_image(image)
        frame = frame_of(
            opened.height, opened.width, self.config.data.image_size, self.config.data.resize
        )
        return _Opened(
            opened, sentence, frame, image_to_square(np.asarray(opened), frame).transpose(2, 0, 1)
        )

    def _open_line(self, pair: Request) -> _Opened:
        try:
            return self._open(pair.image, pair.sentence)
        except InputError as error:
            raise InputError(f"{pair.place}: {error}") from None

    def _open_or_pass(self, pair: Request) -> _Opened | InputError:
        try:
            return self._open(pair.image, pair.sentence)
        except InputError as error:
            log.warning(
                "passed over: %s; repair or remove it, and give the same command again", error
            )
            return error

    def _asked(
        self, opened: Iterator[_Opened | InputError], batch: int
    ) -> Iterator[_Asked | InputError]:
        """The same pairs, `batch` of them asked at a time; what could not be opened stays in its place."""
        while chunk := list(islice(opened, batch)):
            answers = iter(self._ask([one for one in chunk if isinstance(one, _Opened)]))
            yield from (next(answers) if isinstance(one, _Opened) else one for one in chunk)

    @torch.inference_mode()
    def _ask(self, opened: list[_Opened]) -> list[_Asked]:
        """Give the device a batch to work on, and do not wait for it."""
        if not opened:
            return []
        words, word_mask, cut = self.tokenizer.encode(
            [tidy(one.sentence) for one in opened], self.config.data.max_tokens
        )
        inputs = [np.stack([one.square for one in opened]), words.numpy(), word_mask.numpy()]
        logits = self._net(*(start_copy(values, self.device) for values in inputs)).float()
        asked = []
        for one, square, was_cut in zip(opened, logits, cut):
            large = logits_at_original_size(square, one.frame)
            asked.append(
                _Asked(one, PendingCopy(large > 0), PendingCopy(torch.sigmoid(large)), was_cut)
            )
        return asked


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """`work(item)` of each item, in their order; threads are at work on up to `ahead` items behind the one that is handed out."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


# --------------------------------------------------------------------------------------------------------- files


def write_prediction(
    folder: Path, name: str, image: Picture, prediction: Prediction
) -> dict[str, str]:
    """Write <name>.mask.png and <name>.overlay.png into `folder`; returns their names, {"mask": …, "overlay": …}."""
    files = {"mask": f"{name}.mask.png", "overlay": f"{name}.overlay.png"}
    save_png(folder / files["mask"], Image.fromarray(prediction.mask.astype(np.uint8) * 255))
    # A photograph hardly shrinks any further: level 6 takes 2.4 times as long for 4 % less.
    save_png(
        folder / files["overlay"],
        Image.fromarray(overlay(np.asarray(open_image(image)), prediction.mask)),
        level=1,
    )
    return files


def open_image(image: Picture) -> Image.Image:
    """Any kind of `Picture` as an upright RGB image.

    Raises:
        InputError: no such file, not an image, or an array of another type or shape.
    """
    match image:
        case Image.Image():
            return ImageOps.exif_transpose(image).convert("RGB")
        case np.ndarray():
            if (
                image.dtype != np.uint8
                or not image.size
                or not (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 3)
            ):
                found = f"{image.dtype} {list(image.shape)}"
                raise InputError(
                    f"image array {found}: uint8 [H, W, 3] (RGB) or [H, W] (gray) is expected"
                )
            return Image.fromarray(image).convert("RGB")
    try:
        return ImageOps.exif_transpose(Image.open(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{image}: cannot be read as an image: {error}") from None


# ----------------------------------------------------------------------------------------------- the small print


def _write(pair: Request, asked: _Asked | InputError, output: Path) -> dict[str, Any]:
    """Write the files of a pair; its line of results.jsonl."""
    if isinstance(asked, InputError):
        return {"image": pair.given, "sentence": pair.sentence, "error": str(asked)}
    prediction = asked.prediction()
    return {
        "image": pair.given,
        **prediction.to_json(),
        **write_prediction(output, pair.name, asked.opened.image, prediction),
    }


def _threads() -> int:
    """For opening and writing images, which leave the interpreter to others most of the time."""
    return min(16, os.cpu_count() or 1)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device {name!r}: cpu, cuda or cuda:N is expected") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: this host shows {torch.cuda.device_count()} GPUs")
    return device
