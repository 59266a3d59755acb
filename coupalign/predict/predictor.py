"""Predict masks with a trained model, for one photograph and sentence or for many.

    predictor = Predictor.from_checkpoint("runs/demo")
    prediction = predictor.predict("photo.jpg", "the small red star")

A file of pairs is CSV with the columns `image` and `sentence`, or JSONL with those keys. Its images
are found relative to the file. A folder means all of its images with one sentence. The output
folder gets

    <name>.mask.png      0 and 255, the photograph's size
    <name>.overlay.png   the mask on the photograph
    results.jsonl        written last, one line per request: `Prediction.to_json` and the names of
                         the files, or an `error`

<name> is <image stem>-<n> for the n-th pair of a file, counted from 1, and <image stem> in a
folder. The end of a long name is a digest. A byte of a file name that is not UTF-8 is written as
\\udcXX, so that `os.fsencode` gives the name back.

A photograph is what a viewer shows, see `data/pictures.py`. While the model works, threads open the
images of the next batch and write the files of the previous one. In a file of pairs, an unreadable
image is an error, and no results.jsonl is written. In a folder it is skipped, with a warning and
its error in results.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from coupalign.config.schema import Config
from coupalign.data.batch import Frame
from coupalign.data.pictures import DecodedPicture, decode_picture, open_header, read_picture, shown
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import decode_image, frame_of, image_to_square, reduction
from coupalign.engine.base import MixedPrecision
from coupalign.engine.open_checkpoint import open_checkpoint
from coupalign.errors import InputError, RunError, quoted
from coupalign.evaluation.protocols import logits_at_original_size
from coupalign.evaluation.transfer import PendingCopy, start_copy
from coupalign.files import require_writable, whole_file
from coupalign.model.base import ReferringModel
from coupalign.predict.requests import (
    Request,
    folder_requests,
    normalize_sentence,
    read_requests,
    short_name,
)
from coupalign.report.drawing import overlay, save_png

log = logging.getLogger(__name__)

# A batch has about 8 bytes per pixel, and up to three are in memory at a time.
PIXELS_PER_BATCH = 2**28

T, R = TypeVar("T"), TypeVar("R")
Picture = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The object that a sentence refers to in a photograph of H x W pixels.

    Attributes:
        mask: bool [H, W], probability above 0.5.
        probability: float32 [H, W].
        box: (x0, y0, x1, y1) around the mask in pixels, x1 and y1 exclusive. None for an empty
            mask.
        area: number of pixels in the mask.
        score: mean probability inside the mask, 0 for an empty mask. Not calibrated.
        cut: whether the sentence exceeded the model's token limit, so that its end was not read.
        unknown: whether no word of the sentence is in the vocabulary, so that the mask does not
            depend on it.
        turned: whether the photograph was turned as its EXIF orientation says. The mask is turned
            like it.
    """

    sentence: str
    mask: np.ndarray
    probability: np.ndarray
    box: tuple[int, int, int, int] | None
    area: int
    score: float
    cut: bool
    unknown: bool
    turned: bool

    def to_json(self) -> dict[str, Any]:
        """Return the prediction without its pixels."""
        height, width = self.mask.shape
        box = None if self.box is None else list(self.box)
        return {
            "sentence": self.sentence,
            "box": box,
            "area": self.area,
            "score": round(self.score, 6),
            "height": height,
            "width": width,
            "cut": self.cut,
            "unknown": self.unknown,
            "turned": self.turned,
        }


@dataclass(frozen=True)
class _ModelInput:
    """An opened image and its sentence.

    Attributes:
        text: the sentence as the tokenizer gets it.
        square: the image as the model sees it, uint8 [3, S, S].
    """

    image: Image.Image
    turned: bool
    sentence: str
    text: str
    frame: Frame
    square: np.ndarray


@dataclass(frozen=True)
class _PendingPrediction:
    """A prediction whose pixels are still on their way from the device."""

    source: _ModelInput
    mask: PendingCopy
    probability: PendingCopy
    finite: PendingCopy
    cut: bool
    unknown: bool

    def result(self) -> Prediction:
        """Wait for the pixels.

        Raises:
            RunError: the model gave NaN or infinity, which would look like an empty mask.
        """
        if not self.finite.numpy():
            raise RunError(
                f"the model gave NaN or infinity for the sentence {quoted(self.source.sentence)}. "
                "Take an earlier checkpoint, or one that was trained in fp32"
            )
        mask, probability = self.mask.numpy(), self.probability.numpy()

        box, score = None, 0.0
        if mask.any():
            rows = np.flatnonzero(mask.any(axis=1))
            columns = np.flatnonzero(mask.any(axis=0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            score = float(probability[mask].mean(dtype=np.float64))

        return Prediction(
            sentence=self.source.sentence,
            mask=mask,
            probability=probability,
            box=box,
            area=int(mask.sum()),
            score=score,
            cut=self.cut,
            unknown=self.unknown,
            turned=self.source.turned,
        )


class Predictor:
    """A model in evaluation mode with its tokenizer.

    It runs in the precision of its configuration, in which it was trained and scored: `precision:
    bf16` means autocast, on a CPU as on a GPU. It decodes a JPEG as the evaluation does, and gives
    the tokenizer what the evaluation gives it. So the mask of a packed photograph and its packed
    sentence (`sent`, or `raw` with `data.sentence: raw`) is the mask that was scored.

    Two things are done for what people give, and not in evaluation. A photograph with an EXIF
    orientation is turned. With `data.sentence: cleaned`, final punctuation after a word is removed.
    The further cleaning of the data sets' makers, such as "grey" to "gray", is not repeated.
    """

    def __init__(
        self, config: Config, model: ReferringModel, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.config = config
        self.model = model.eval().to(device)
        self.tokenizer = tokenizer
        self.device = device
        self._net = MixedPrecision(self.model, config.precision).eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | None = None) -> Predictor:
        """Read a run directory (its best checkpoint, else its newest) or one checkpoint directory.

        Args:
            device: "cpu", "cuda", "cuda:1" … Default: the GPU, if there is one.

        Raises:
            InputError: there is no checkpoint, or its weights belong to another model.
        """
        torch_device = _find_device(device)
        config, model, tokenizer = open_checkpoint(path, torch_device)
        return cls(config, model, tokenizer, torch_device)

    def predict(self, image: Picture, sentence: str) -> Prediction:
        """Segment the object that `sentence` refers to in `image`.

        Args:
            image: a path, a PIL image, or uint8 [H, W, 3] (RGB) or [H, W] (gray). The EXIF
                orientation of a file or PIL image is applied.

        Raises:
            InputError: no such image, not an image, or no words in the sentence.
        """
        [pending] = self._start_batch([self._prepare(image, sentence)])
        return pending.result()

    def predict_many(
        self, pairs: Iterable[tuple[Picture, str]], batch: int = 8
    ) -> Iterator[Prediction]:
        """Predict (image, sentence) pairs in their order, `batch` of them at a time.

        Pairs are read up to three batches ahead of their predictions.
        """
        with ThreadPoolExecutor(_threads()) as pool:
            inputs = in_order(pool, lambda pair: self._prepare(*pair), pairs, batch)
            pending = self._start_batches(inputs, batch)
            yield from in_order(pool, _PendingPrediction.result, pending, batch)

    def predict_to(self, image: Path, sentence: str, output: Path) -> dict[str, Any]:
        """Predict one pair and write <image stem>.mask.png and .overlay.png into `output`.

        Returns:
            what a line of results.jsonl would hold.
        """
        request = Request(
            source=str(image),
            given=str(image),
            image=Path(image),
            sentence=sentence,
            name=short_name(Path(image).stem),
        )
        source = self._prepare(image, sentence)
        _require_place(output)
        self._warn_of_sentences([request])

        [pending] = self._start_batch([source])
        return _write_result(request, pending, Path(output))

    def predict_file(self, pairs: Path, output: Path, batch: int = 8) -> list[dict[str, Any]]:
        """Predict every pair of a CSV or JSONL file.

        Writes masks, overlays and, last, results.jsonl into `output`.

        Returns:
            the lines of results.jsonl.

        Raises:
            InputError: a line is wrong. The message names file and line. All lines are checked
                first.
        """
        requests = read_requests(Path(pairs))
        return self._predict_all(requests, Path(output), batch, self._prepare_line)

    def predict_folder(
        self, folder: Path, sentence: str, output: Path, batch: int = 8
    ) -> list[dict[str, Any]]:
        """Predict one sentence on every image of a folder.

        Writes masks, overlays and, last, results.jsonl into `output`.

        Returns:
            the lines of results.jsonl, sorted by image name. An unreadable image has an "error" and
            no files. A warning names the files that are no images.

        Raises:
            InputError: no images there, no words in the sentence, or `output` is the folder itself.
        """
        folder, output = Path(folder), Path(output)
        requests, left_out = folder_requests(folder, sentence)
        if output.resolve() == folder.resolve():
            raise InputError(
                f"{output}: masks among the images would be taken for images the next time; "
                "give another folder with --out"
            )
        if left_out:
            log.warning("%s: left out what is no image: %s", folder, _listed(left_out))
        return self._predict_all(requests, output, batch, self._prepare_or_skip)

    def _predict_all(
        self,
        requests: list[Request],
        output: Path,
        batch: int,
        prepare: Callable[[Request], _ModelInput | InputError],
    ) -> list[dict[str, Any]]:
        _require_place(output)
        self._warn_of_sentences(requests)
        # An older list would name the new masks.
        with _saving(output):
            (output / "results.jsonl").unlink(missing_ok=True)

        results = []
        with (
            ThreadPoolExecutor(_threads()) as pool,
            tqdm(desc="predicting", total=len(requests), unit="image", leave=False) as progress,
        ):
            for size, group in groupby(requests, lambda request: _batch_of(request, batch)):
                # Large images wait for each other, one batch at a time.
                ahead = batch if size == batch else size - 1
                lines = self._predict_group(
                    list(group), output, prepare, batch=size, ahead=ahead, pool=pool
                )
                for line in lines:
                    results.append(line)
                    progress.update()

        with _saving(output), whole_file(output / "results.jsonl", "w") as file:
            file.writelines(json_line(result) + "\n" for result in results)
        return results

    def _predict_group(
        self,
        requests: list[Request],
        output: Path,
        prepare: Callable[[Request], _ModelInput | InputError],
        *,
        batch: int,
        ahead: int,
        pool: ThreadPoolExecutor,
    ) -> Iterator[dict[str, Any]]:
        # A pipeline: threads prepare inputs, this thread runs the model, threads write results.
        inputs = in_order(pool, prepare, requests, ahead)
        pending = self._start_batches(inputs, batch)
        pairs = zip(requests, pending)
        return in_order(pool, lambda pair: _write_result(*pair, output), pairs, ahead)

    def _prepare(self, image: Picture, sentence: str) -> _ModelInput:
        """Open an image and bring it into the model's square."""
        picture = open_picture(image)
        height, width = picture.image.height, picture.image.width
        data = self.config.data
        frame = frame_of(height, width, data.image_size, data.resize)

        # Evaluation decodes a large JPEG smaller than it is.
        pixels = np.asarray(picture.image)
        if picture.jpeg is not None and reduction(height, width, frame) > 1:
            pixels = decode_image(picture.jpeg, frame)
        square = image_to_square(pixels, frame).transpose(2, 0, 1)

        return _ModelInput(
            image=picture.image,
            turned=picture.orientation > 1,
            sentence=sentence,
            text=self._text_of(sentence),
            frame=frame,
            square=square,
        )

    def _text_of(self, sentence: str) -> str:
        """Return what the tokenizer gets, as in evaluation: a raw sentence as it was typed."""
        cleaned = normalize_sentence(sentence)
        return cleaned if self.config.data.sentence == "cleaned" else sentence

    def _warn_of_sentences(self, requests: list[Request]) -> None:
        """Warn of sentences that the model does not read, or not to their end."""
        sources: dict[str, str] = {}
        for request in requests:
            sources.setdefault(request.sentence, request.source)
        sentences = list(sources)
        words, _, cut = self.tokenizer.encode(
            [self._text_of(sentence) for sentence in sentences], self.config.data.max_tokens
        )

        facts = {
            "none of its words is in the model's vocabulary, so the mask does not depend on it": (
                self.tokenizer.unknown(words)
            ),
            f"it is longer than {self.config.data.max_tokens} tokens, so its end is not read": cut,
        }
        for fact, holds in facts.items():
            named = [sentence for sentence, holds_here in zip(sentences, holds) if holds_here]
            if named:
                others = f" (and {len(named) - 1:,} more)" if len(named) > 1 else ""
                source, first = sources[named[0]], quoted(named[0])
                log.warning("%s: sentence %s%s: %s", shown(source), first, others, fact)

    def _prepare_line(self, request: Request) -> _ModelInput:
        """Prepare a request of a file of pairs, whose errors name the line."""
        try:
            return self._prepare(request.image, request.sentence)
        except InputError as error:
            raise InputError(f"{request.source}: {error}") from None

    def _prepare_or_skip(self, request: Request) -> _ModelInput | InputError:
        """Prepare a request of a folder, where an unreadable image is skipped with a warning."""
        try:
            return self._prepare(request.image, request.sentence)
        except InputError as error:
            log.warning("skipped: %s; repair or remove it, then repeat the command", error)
            return error

    def _start_batches(
        self, inputs: Iterator[_ModelInput | InputError], batch: int
    ) -> Iterator[_PendingPrediction | InputError]:
        """Start predictions, `batch` inputs at a time. Errors keep their position."""
        while chunk := list(islice(inputs, batch)):
            readable = [item for item in chunk if isinstance(item, _ModelInput)]
            pending = iter(self._start_batch(readable))
            for item in chunk:
                yield next(pending) if isinstance(item, _ModelInput) else item

    @torch.inference_mode()
    def _start_batch(self, inputs: list[_ModelInput]) -> list[_PendingPrediction]:
        """Start the prediction of a batch on the device without waiting for it."""
        if not inputs:
            return []

        texts = [item.text for item in inputs]
        words, word_mask, cut = self.tokenizer.encode(texts, self.config.data.max_tokens)
        unknown = self.tokenizer.unknown(words)
        squares = np.stack([item.square for item in inputs])

        on_host = (squares, words.numpy(), word_mask.numpy())
        on_device = [start_copy(values, self.device) for values in on_host]
        logits = self._net(*on_device).float()

        pending = []
        for item, square_logits, was_cut, is_unknown in zip(inputs, logits, cut, unknown):
            full_size = logits_at_original_size(square_logits, item.frame)
            prediction = _PendingPrediction(
                source=item,
                mask=PendingCopy(full_size > 0),
                probability=PendingCopy(torch.sigmoid(full_size)),
                finite=PendingCopy(torch.isfinite(square_logits).all()),
                cut=was_cut,
                unknown=is_unknown,
            )
            pending.append(prediction)
        return pending


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """Map `work` over `items` in threads, in order, at most `ahead` items ahead of the consumer."""
    running: deque[Future[R]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def write_prediction(
    folder: Path, name: str, image: Picture, prediction: Prediction
) -> dict[str, str]:
    """Write <name>.mask.png and <name>.overlay.png into `folder`.

    Returns:
        their names, {"mask": …, "overlay": …}.
    """
    files = {"mask": f"{name}.mask.png", "overlay": f"{name}.overlay.png"}

    mask = Image.fromarray(prediction.mask.astype(np.uint8) * 255)
    save_png(folder / files["mask"], mask)

    # A photograph hardly shrinks any further: level 6 takes 2.4 times as long for 4 % less.
    on_photograph = overlay(np.asarray(open_picture(image).image), prediction.mask)
    save_png(folder / files["overlay"], Image.fromarray(on_photograph), level=1)
    return files


def open_picture(image: Picture) -> DecodedPicture:
    """Open any kind of `Picture`.

    Raises:
        InputError: no such file, not an image, or an array of another type or shape.
    """
    match image:
        case Image.Image():
            try:
                picture = decode_picture(image)
            except ValueError as error:
                raise InputError(f"image of mode {image.mode}: {error}") from None
        case np.ndarray():
            gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
            if image.dtype != np.uint8 or not image.size or not gray_or_rgb:
                raise InputError(
                    f"image array {image.dtype} {list(image.shape)}: "
                    "uint8 [H, W, 3] (RGB) or [H, W] (gray) is expected"
                )
            picture = decode_picture(Image.fromarray(image))
        case _:
            picture = read_picture(Path(image))

    if picture.doubt:
        name = "image" if isinstance(image, Image.Image) else shown(image)
        log.warning("%s: %s; it is taken as it is stored", name, picture.doubt)
    return picture


def json_line(value: Any) -> str:
    """Return a value as JSON in one line.

    What cannot be written in UTF-8, as a byte of a file name that is not UTF-8, becomes \\udcXX.
    """
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(value)
    return line


def _write_result(
    request: Request, pending: _PendingPrediction | InputError, output: Path
) -> dict[str, Any]:
    """Write the files of a request and return its line of results.jsonl."""
    if isinstance(pending, InputError):
        return {"image": request.given, "sentence": request.sentence, "error": str(pending)}

    prediction = pending.result()
    with _saving(output):
        files = write_prediction(output, request.name, pending.source.image, prediction)
    return {"image": request.given, **prediction.to_json(), **files}


def _batch_of(request: Request, batch: int) -> int:
    """Return how many images like that of the request may be in a batch, for the memory."""
    try:
        with open_header(request.image) as image:
            pixels = image.width * image.height
    except (OSError, ValueError):
        return batch  # `prepare` says what is wrong

    # Powers of two, so that neighbors of similar sizes share a batch.
    most = max(1, PIXELS_PER_BATCH // max(1, pixels))
    return min(batch, 1 << (most.bit_length() - 1))


def _require_place(output: Path) -> None:
    require_writable(output, "masks and results", "Give another folder with --out")


@contextmanager
def _saving(output: Path) -> Iterator[None]:
    """Turn an error of the disk into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{output}: masks and results cannot be written ({error}); "
            "free some space or give another folder with --out, then repeat the command"
        ) from error


def _listed(names: list[str], most: int = 5) -> str:
    more = f", … ({len(names):,} in all)" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _threads() -> int:
    """Number of threads that open and write images, which mostly release the interpreter."""
    return min(16, os.cpu_count() or 1)


def _find_device(name: str | None) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device: torch.device | None = None
    with suppress(RuntimeError):
        device = torch.device(name or default)
    # PyTorch knows more kinds of devices, "meta" among them, than this package was made for.
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}: cpu, cuda or cuda:N is expected")

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: this host shows {torch.cuda.device_count()} GPUs")
    return device
