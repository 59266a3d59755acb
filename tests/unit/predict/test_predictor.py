"""A trained model at work: one pair, many pairs, files of pairs and folders of images."""

from __future__ import annotations

import errno
import json
import logging
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import coupalign
from coupalign.cli.parser import main
from coupalign.config.schema import Config, Source
from coupalign.data.batch import SampleInfo
from coupalign.data.build import build_eval_loader
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import Recipe
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import reduction
from coupalign.distributed.world import World
from coupalign.errors import InputError, RunError
from coupalign.evaluation.rows import read_rows
from coupalign.predict import predictor as predictor_module
from coupalign.predict.predictor import Prediction, Predictor, in_order, open_picture
from coupalign.scoring.checkpoint import score_checkpoint
from coupalign.scoring.splits import ScoreRequest
from tests.unit.predict.conftest import PHOTOS, SENTENCES, tiny_config, write_checkpoint


def assert_same(left: Prediction, right: Prediction, tolerance: float = 0.0) -> None:
    """Two predictions have the same size and, up to a tolerance, the same probabilities."""
    assert left.mask.shape == right.mask.shape
    assert float(np.abs(left.probability - right.probability).max()) <= tolerance


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_mask(folder: Path, result: dict[str, Any]) -> np.ndarray:
    """The pixels of the mask file that a line of results.jsonl names."""
    return np.asarray(Image.open(folder / result["mask"]))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl. Only line feeds end a line."""
    text = (folder / "results.jsonl").read_text()
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


# --- One pair, and many ---


@pytest.mark.parametrize(("name", "shape"), [(name, shape[:2]) for name, shape, _ in PHOTOS])
def test_fields_of_a_prediction_agree(
    predictor: Predictor, photos: Path, name: str, shape: tuple[int, int]
) -> None:
    result = predictor.predict(photos / name, SENTENCES[0])

    # The mask is where the probability is above a half.
    mask, probability = result.mask, result.probability
    assert mask.shape == probability.shape == shape
    assert mask.dtype == bool
    assert probability.dtype == np.float32
    assert probability.min() >= 0
    assert probability.max() <= 1
    assert (mask == (probability > 0.5)).all()
    assert result.area == mask.sum()
    assert 0 < result.area < mask.size

    # The box touches the mask on all four sides and leaves nothing outside.
    x0, y0, x1, y1 = result.box
    outside = mask.copy()
    outside[y0:y1, x0:x1] = False
    assert not outside.any()
    assert mask[y0].any()
    assert mask[y1 - 1].any()
    assert mask[:, x0].any()
    assert mask[:, x1 - 1].any()

    assert result.score == pytest.approx(probability[mask].mean(), abs=1e-6)
    json.dumps(result.to_json())


def test_empty_mask_has_no_box(run: Path, photos: Path) -> None:
    predictor = Predictor.from_checkpoint(run, "cpu")
    predictor.model.register_forward_hook(lambda module, inputs, logits: -logits.abs() - 1)

    result = predictor.predict(photos / "wide.jpg", SENTENCES[0])

    assert (result.box, result.area, result.score) == (None, 0, 0.0)


def test_paths_pil_images_and_arrays_give_the_same_prediction(
    predictor: Predictor, photos: Path
) -> None:
    path = photos / "tall.png"
    expected = predictor.predict(path, SENTENCES[1])

    with Image.open(path) as opened:
        for image in (str(path), opened, np.asarray(opened)):
            assert_same(predictor.predict(image, SENTENCES[1]), expected)


def test_gray_image_means_three_equal_colors(predictor: Predictor, photos: Path) -> None:
    gray = np.asarray(Image.open(photos / "gray.png"))
    colors = np.stack([gray] * 3, axis=-1)

    from_gray = predictor.predict(gray, SENTENCES[0])
    from_colors = predictor.predict(colors, SENTENCES[0])

    assert_same(from_gray, from_colors)


def test_exif_orientation_is_applied(predictor: Predictor, photos: Path, tmp_path: Path) -> None:
    # Store the image rotated, with the note to turn it back by 90 degrees clockwise.
    upright = Image.open(photos / "tall.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    rotated.save(tmp_path / "rotated.png", exif=exif)

    from_rotated = predictor.predict(tmp_path / "rotated.png", SENTENCES[0])

    assert_same(from_rotated, predictor.predict(upright, SENTENCES[0]))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_predict_many_gives_the_same_for_every_batch_size(
    predictor: Predictor, photos: Path, batch: int
) -> None:
    pairs = [(path, sentence) for path in sorted(photos.iterdir()) for sentence in SENTENCES]

    results = list(predictor.predict_many(iter(pairs), batch))

    assert [result.sentence for result in results] == [sentence for _, sentence in pairs]
    for (path, sentence), result in zip(pairs, results):
        assert_same(result, predictor.predict(path, sentence), tolerance=1e-5)


def test_package_loads_a_run(run: Path, predictor: Predictor, photos: Path) -> None:
    image = photos / "wide.jpg"

    result = coupalign.load(run, "cpu").predict(image, SENTENCES[0])

    assert_same(result, predictor.predict(image, SENTENCES[0]))


def test_letterbox_mask_has_the_size_of_the_photograph(tmp_path: Path, photos: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", tiny_config(resize="letterbox"))
    predictor = Predictor.from_checkpoint(checkpoint, "cpu")

    result = predictor.predict(photos / "wide.jpg", SENTENCES[0])

    assert result.mask.shape == (40, 90)


def test_spaces_and_final_punctuation_of_a_sentence_do_not_matter(
    predictor: Predictor, photos: Path
) -> None:
    image = photos / "gray.png"

    plain = predictor.predict(image, "small red star")
    spaced = predictor.predict(image, "  small  red\nstar. ")

    assert_same(spaced, plain)


def test_cut_tells_whether_the_sentence_was_too_long(predictor: Predictor, photos: Path) -> None:
    image = photos / "gray.png"

    assert not predictor.predict(image, "small red star").cut
    assert predictor.predict(image, "star " * 30).cut


def read_samples(config: Config, tokenizer: Tokenizer) -> list[SampleInfo]:
    """The samples that an evaluation scores, with image and ground truth."""
    loader = build_eval_loader(
        config.data,
        config.data.evaluate,
        batch=3,
        world=World(0, 1, 0, 1, torch.device("cpu")),
        tokenizer=tokenizer,
        images=True,
    )
    return [info for batch in loader for info in batch.info]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masks_are_those_that_were_scored(shards: Path, tmp_path: Path, precision: str) -> None:
    # Score a checkpoint on the packed validation split.
    config = tiny_config()
    source = Source(index=str(shards), split="val")
    data = config.data.model_copy(update={"evaluate": (source,), "workers": 0})
    evaluate = config.evaluate.model_copy(update={"batch": 3, "bootstrap": 0})
    config = config.model_copy(update={"data": data, "precision": precision, "evaluate": evaluate})
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "best", config)
    score_checkpoint(run, request=ScoreRequest(protocols=["ris-v1"]))
    scored = read_rows(run / "scores" / "val-ris-v1.csv").counts[:, 1:3].tolist()

    # Predict the same samples in the same batches.
    predictor = Predictor.from_checkpoint(run, "cpu")
    samples = read_samples(config, predictor.tokenizer)
    pairs = [(info.image, info.sentence) for info in samples]
    masks = [result.mask for result in predictor.predict_many(pairs, 3)]

    # Intersection and union are those of the evaluation.
    predicted = []
    for mask, info in zip(masks, samples):
        predicted.append([(mask & info.truth).sum(), (mask | info.truth).sum()])
    assert scored == predicted

    # The test can see the precision: in bf16 the masks differ from those in fp32.
    in_fp32 = config.model_copy(update={"precision": "fp32"})
    reference = Predictor(in_fp32, predictor.model, predictor.tokenizer, predictor.device)
    equal_to_fp32 = []
    for mask, info in zip(masks, samples):
        reference_mask = reference.predict(info.image, info.sentence).mask
        equal_to_fp32.append((reference_mask == mask).all())
    assert all(equal_to_fp32) is (precision == "fp32")


def pack_large_photographs(folder: Path) -> Path:
    """Pack photographs that evaluation decodes at half their size, with odd sentences."""
    random = np.random.default_rng(0)
    sentences = ["the red star .", "Red, RED star", "star ' 2 '.", " left\tstar", "star!"]
    images, annotations, refs = [], [], []
    (folder / "images" / "train2014").mkdir(parents=True)
    for number, sentence in enumerate(sentences, 1):
        name = f"photo-{number}.jpg"
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((480, 360), Image.Resampling.BICUBIC).save(
            folder / "images" / "train2014" / name
        )
        images.append({"id": number, "file_name": name, "height": 360, "width": 480})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "segmentation": [[20, 20, 200, 20, 200, 160, 20, 160]],
                "area": 180 * 140,
                "bbox": [20, 20, 180, 140],
                "iscrowd": 0,
            }
        )
        texts = {"sent_id": number, "sent": sentence.lower(), "raw": sentence, "tokens": []}
        refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": number,
                "category_id": 1,
                "split": "val",
                "sent_ids": [number],
                "sentences": [texts],
            }
        )

    categories = [{"id": 1, "name": "star"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "own").mkdir()
    (folder / "own" / "instances.json").write_text(json.dumps(tree))
    (folder / "own" / "refs(all).json").write_text(json.dumps(refs))
    recipe = {"name": "own", "root": folder, "sets": [{"dataset": "own", "split_by": "all"}]}
    pack(
        Recipe.model_validate(recipe | {"vocabulary_size": 100}), folder / "shards", progress=False
    )
    return folder / "shards"


@pytest.mark.parametrize("field", ["sent", "raw"])
def test_packed_photograph_and_sentence_give_the_mask_that_was_scored(
    tmp_path: Path, field: str
) -> None:
    source = Source(index=str(pack_large_photographs(tmp_path)), split="val")
    config = tiny_config()
    sentence = {"sent": "cleaned", "raw": "raw"}[field]
    changes = {"evaluate": (source,), "workers": 0, "sentence": sentence}
    data = config.data.model_copy(update=changes)
    evaluate = config.evaluate.model_copy(update={"batch": 1, "bootstrap": 0})
    config = config.model_copy(update={"data": data, "evaluate": evaluate})
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "best", config)
    score_checkpoint(run, request=ScoreRequest(protocols=["ris-v1"]))
    [rows_file] = (run / "scores").glob("*.csv")
    scored = read_rows(rows_file).counts[:, 1:3].tolist()

    # Predict the packed files with the packed sentences.
    for tar in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(tar) as opened:
            opened.extractall(tmp_path / "files", filter="data")
    predictor = Predictor.from_checkpoint(run, "cpu")
    predicted = []
    for info in read_samples(config, predictor.tokenizer):
        file = tmp_path / "files" / f"{info.image_id:012d}.jpg"
        record = json.loads(file.with_suffix(".json").read_text())
        mask = predictor.predict(file, record["refs"][0]["sentences"][0][field]).mask
        predicted.append([(mask & info.truth).sum(), (mask | info.truth).sum()])
        assert reduction(*mask.shape, info.frame) > 1

    # With `cleaned`, predicting drops an exclamation mark that somebody typed after a word.
    differing = [4] if field == "sent" else []
    equal = [number for number in range(5) if number not in differing]
    assert [predicted[number] for number in equal] == [scored[number] for number in equal]


def test_turned_photograph_gives_a_turned_mask_and_overlay(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    upright = Image.open(photos / "wide.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    rotated.save(tmp_path / "phone.png", exif=exif)

    result = predictor.predict_to(tmp_path / "phone.png", SENTENCES[0], tmp_path / "out")
    plain = predictor.predict_to(photos / "wide.jpg", SENTENCES[0], tmp_path / "plain")

    assert result["turned"]
    assert not plain["turned"]
    assert (result["height"], result["width"]) == (40, 90)
    for kind in ("mask", "overlay"):
        turned_pixels = np.asarray(Image.open(tmp_path / "out" / result[kind]))
        assert np.array_equal(turned_pixels, Image.open(tmp_path / "plain" / plain[kind]))


def test_sentence_without_a_known_word_is_said(
    predictor: Predictor,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    results = predictor.predict_folder(photos, "\u7ea2\u8272\u7684\u676f\u5b50", tmp_path / "out")

    assert [result["unknown"] for result in results] == [True, True, True]
    [message] = [record.getMessage() for record in caplog.records]
    assert "none of its words is in the model's vocabulary" in message
    assert not predictor.predict(photos / "wide.jpg", "\u7ea2\u8272 star").unknown


def test_cut_sentences_of_a_file_are_named_once(
    predictor: Predictor, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "photos").symlink_to(photos)
    pairs = [("photos/gray.png", word * 30) for word in ("star ", "red ")]

    predictor.predict_file(write_pairs(tmp_path / "pairs.jsonl", pairs), tmp_path / "out")

    [message] = [record.getMessage() for record in caplog.records]
    assert "line 1" in message
    assert "(and 1 more)" in message
    assert "its end is not read" in message


# --- Wrong arguments ---


@pytest.mark.parametrize("sentence", ["", "  \n", "?!"])
def test_sentence_without_words_is_refused(
    predictor: Predictor, photos: Path, sentence: str
) -> None:
    with pytest.raises(InputError, match="holds no words"):
        predictor.predict(photos / "gray.png", sentence)


@pytest.mark.parametrize("name", ["none.jpg", "text.jpg", "cut.jpg", "."])
def test_unreadable_image_file_is_refused(tmp_path: Path, photos: Path, name: str) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])

    with pytest.raises(InputError, match="cannot be read as an image"):
        open_picture(tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 4, 3), np.float64),
        ((4, 4, 4), np.uint8),
        ((0, 4, 3), np.uint8),
        ((4,), np.uint8),
    ],
)
def test_array_that_is_no_image_is_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(InputError, match="uint8"):
        open_picture(np.zeros(shape, dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_model_is_no_empty_mask(photos: Path, tmp_path: Path, value: float) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    predictor = Predictor.from_checkpoint(tmp_path / "run", "cpu")
    with torch.no_grad():
        for parameter in predictor.model.parameters():
            parameter.fill_(value)

    with pytest.raises(RunError, match="NaN or infinity for the sentence .*earlier checkpoint"):
        predictor.predict(photos / PHOTOS[0][0], SENTENCES[0])


@pytest.mark.parametrize("device", ["gpu7", "cuda:63", "meta", "mps"])
def test_absent_device_is_refused(run: Path, device: str) -> None:
    with pytest.raises(InputError, match=device):
        Predictor.from_checkpoint(run, device)


# --- Files of pairs ---


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    """Write (image, sentence) pairs as CSV or, with empty lines in between, as JSONL."""
    if path.suffix == ".csv":
        lines = ["sentence,image\n"]
        lines += [f'"{sentence}",{image}\n' for image, sentence in pairs]
    else:
        rows = [{"image": image, "sentence": sentence} for image, sentence in pairs]
        lines = [json.dumps(row) + "\n\n" for row in rows]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_predict_file_writes_masks_overlays_and_results(
    predictor: Predictor, photos: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    (tmp_path / "photos").symlink_to(photos)
    pairs = [
        ("photos/wide.jpg", "small red star"),
        ("photos/gray.png", "star, left"),
        ("photos/wide.jpg", "caf\u00e9 \u2028 square"),
    ]

    results = predictor.predict_file(write_pairs(tmp_path / name, pairs), out, batch=2)

    assert read_results(out) == results
    assert names_in(out) == {
        "wide-1.mask.png",
        "wide-1.overlay.png",
        "gray-2.mask.png",
        "gray-2.overlay.png",
        "wide-3.mask.png",
        "wide-3.overlay.png",
        "results.jsonl",
    }
    assert len(results) == len(pairs)
    for (image, sentence), result in zip(pairs, results):
        assert (result["image"], result["sentence"]) == (image, sentence)

        mask = read_mask(out, result)
        expected = predictor.predict(tmp_path / image, sentence)
        assert mask.dtype == np.uint8
        assert (mask == expected.mask * 255).all()
        assert result["area"] == expected.area

        height, width = mask.shape
        assert Image.open(out / result["overlay"]).size == (width, height)


def test_predict_to_writes_the_files_of_one_pair(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    result = predictor.predict_to(photos / "tall.png", SENTENCES[2], out)

    assert (result["mask"], result["overlay"]) == ("tall.mask.png", "tall.overlay.png")
    assert names_in(out) == {"tall.mask.png", "tall.overlay.png"}
    assert (result["height"], result["width"]) == (70, 30)


def test_damaged_image_of_a_file_names_the_line_and_leaves_no_results(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])
    (tmp_path / "wide.jpg").symlink_to(photos / "wide.jpg")
    pairs = write_pairs(tmp_path / "pairs.csv", [("wide.jpg", "star"), ("bad.jpg", "star")])

    with pytest.raises(InputError, match=r"pairs\.csv: line 3: .*bad\.jpg: cannot be read"):
        predictor.predict_file(pairs, tmp_path / "out")

    assert not (tmp_path / "out" / "results.jsonl").exists()


# --- Folders ---


def test_predict_folder_writes_masks_overlays_and_results(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    results = predictor.predict_folder(photos, SENTENCES[0], out, batch=2)

    assert results == read_results(out)
    assert [result["image"] for result in results] == ["gray.png", "tall.png", "wide.jpg"]
    assert names_in(out) == {
        "gray.mask.png",
        "gray.overlay.png",
        "tall.mask.png",
        "tall.overlay.png",
        "wide.mask.png",
        "wide.overlay.png",
        "results.jsonl",
    }
    for result in results:
        expected = predictor.predict(photos / result["image"], SENTENCES[0])
        assert (read_mask(out, result) == expected.mask * 255).all()


def test_unreadable_image_of_a_folder_is_skipped_by_name(
    run: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Four images, one of them damaged, and three entries that are not images.
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "c.JPG", ".hidden.png"):
        (folder / name).symlink_to(photos / "wide.jpg")
    (folder / "notes.txt").write_text("by hand")
    (folder / "b.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])
    (folder / "deeper.png").mkdir()

    command = ["predict", str(run), str(folder), SENTENCES[0]]
    options = ["--out", str(out), "--batch", "1", "--device", "cpu", "--json"]
    with caplog.at_level(logging.WARNING):
        status = main([*command, *options])

    assert status == 1
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == read_results(out)
    images = [result["image"] for result in results]
    assert images == ["a.jpg", "a.png", "b.jpg", "c.JPG"]
    masks = [result.get("mask") for result in results]
    assert masks == ["a.jpg.mask.png", "a.png.mask.png", None, "c.mask.png"]
    assert len(names_in(out)) == 7

    skipped = results[2]
    assert set(skipped) == {"image", "sentence", "error"}
    assert "b.jpg: cannot be read as an image" in skipped["error"]
    messages = [record.getMessage() for record in caplog.records]
    [warning] = [message for message in messages if "skipped" in message]
    assert "b.jpg" in warning
    assert "repair or remove it" in warning
    [left_out] = [message for message in messages if "left out" in message]
    assert left_out.endswith("deeper.png/, notes.txt")


def test_folder_with_odd_names_and_kinds_is_predicted_to_its_end(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    names = [b"a" * 249 + b".jpg", b"caf\xe9.jpg", b"x.jpg", b"x.jpg.jpg", "b\u00e9.gif".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            Image.open(photos / "wide.jpg").save(file, "GIF" if name.endswith(b"gif") else "JPEG")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    Image.open(photos / "wide.jpg").save(folder / "c.avif")
    Image.fromarray(np.zeros((4, 4), np.int32)).save(folder / "deep.tif")

    command = ["predict", str(run), str(folder), SENTENCES[0], "--device", "cpu"]
    status = main([*command, "--out", str(out)])

    assert status == 1
    results = read_results(out)
    assert len(results) == 8
    errors = [result["image"] for result in results if "error" in result]
    assert errors == ["IMG_1.HEIC", "deep.tif"]
    read_back = {os.fsencode(result["image"]) for result in results}
    assert read_back >= set(names)
    masks = [out / result["mask"] for result in results if "mask" in result]
    assert len({*masks}) == 6
    assert all(mask.is_file() for mask in masks)


@pytest.mark.parametrize("full", ["disk", "folder"])
def test_output_that_cannot_be_written_is_said(
    run: Path, photos: Path, tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if full == "folder":
        out.write_text("a file")
    else:

        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(predictor_module, "save_png", fail)
    command = ["predict", str(run), str(photos), SENTENCES[0], "--out", str(out)]

    assert main([*command, "--device", "cpu"]) == {"folder": 2, "disk": 3}[full]
    assert not (out / "results.jsonl").exists()


def test_masks_in_their_own_image_folder_are_refused(predictor: Predictor, photos: Path) -> None:
    with pytest.raises(InputError, match="give another folder with --out"):
        predictor.predict_folder(photos, SENTENCES[0], photos / ".." / photos.name)


def test_predict_command_without_a_sentence_or_with_batch_0_is_refused(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), str(photos)]) == 2
    assert "a sentence is expected after an image or a folder" in capsys.readouterr().err

    assert main(["predict", str(run), str(photos), SENTENCES[0], "--batch", "0"]) == 2


def test_images_are_read_ahead_and_files_written_while_the_model_works(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three steps of the pipeline wait for each other, so without overlap they would time out.

    The model ends its first batch only after the second image was opened. The files of the first
    image are written only after the model began its second batch.
    """
    second_image_open, second_batch_begun = threading.Event(), threading.Event()
    opened: list[str] = []
    batches: list[int] = []
    overlapped: list[bool] = []
    real_open, real_save = predictor_module.open_picture, predictor_module.save_png

    def open_and_signal(image: Any) -> Image.Image:
        opened.append(str(image))
        if len(set(opened)) == 2:
            second_image_open.set()
        return real_open(image)

    def wait_in_forward(*_: object) -> None:
        batches.append(len(batches))
        if len(batches) == 1:
            overlapped.append(second_image_open.wait(30))
        else:
            second_batch_begun.set()

    def wait_then_save(path: Path, image: Image.Image, **options: Any) -> None:
        if path.name.startswith("gray"):
            overlapped.append(second_batch_begun.wait(30))
        real_save(path, image, **options)

    predictor = Predictor.from_checkpoint(run, "cpu")
    predictor.model.register_forward_hook(wait_in_forward)
    monkeypatch.setattr(predictor_module, "_threads", lambda: 2)
    monkeypatch.setattr(predictor_module, "open_picture", open_and_signal)
    monkeypatch.setattr(predictor_module, "save_png", wait_then_save)
    predictor.predict_folder(photos, SENTENCES[0], tmp_path / "out", batch=1)

    assert overlapped == [True, True, True]
    assert len(batches) == 3


def test_large_photographs_are_predicted_in_small_batches(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for number, side in enumerate([10, 10, 10, 40, 20, 20, 20, 10]):
        Image.new("RGB", (side, side)).save(folder / f"{number}.png")
    (folder / "5a.png").write_text("damaged")
    batches: list[int] = []
    predictor = Predictor.from_checkpoint(run, "cpu")
    predictor.model.register_forward_hook(
        lambda module, inputs, logits: batches.append(len(logits))
    )
    monkeypatch.setattr(predictor_module, "PIXELS_PER_BATCH", 1600)

    results = predictor.predict_folder(folder, SENTENCES[0], out, batch=8)

    assert batches == [3, 1, 2, 1, 1]
    images = [f"{name}.png" for name in ("0", "1", "2", "3", "4", "5", "5a", "6", "7")]
    assert [result["image"] for result in results] == images
    assert [result.get("width") for result in results] == [10, 10, 10, 40, 20, 20, None, 20, 10]


def test_older_results_do_not_outlive_a_failed_prediction(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor.predict_folder(photos, SENTENCES[0], tmp_path / "out")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(predictor_module, "save_png", fail)
    with pytest.raises(RunError, match="then repeat the command"):
        predictor.predict_folder(photos, SENTENCES[1], tmp_path / "out")

    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_in_order_keeps_the_order_and_bounds_the_work_ahead() -> None:
    begun: list[int] = []
    items = (begun.append(number) or number for number in range(20))

    with ThreadPoolExecutor(4) as pool:
        for position, value in enumerate(in_order(pool, lambda number: -number, items, 3)):
            assert value == -position
            assert len(begun) <= position + 4
        assert list(in_order(pool, abs, [], 3)) == []


def test_in_order_raises_the_error_of_an_item() -> None:
    with ThreadPoolExecutor(4) as pool, pytest.raises(ZeroDivisionError):
        list(in_order(pool, lambda number: 1 / number, [2, 1, 0], 1))


def test_masks_of_real_photographs_have_their_size(
    predictor: Predictor, real_data: Path, tmp_path: Path
) -> None:
    photos = sorted((real_data / "coco_pool" / "images" / "train2014").glob("*.jpg"))[:4]

    for photo in photos:
        result = predictor.predict_to(photo, "the person on the left", tmp_path)

        assert Image.open(tmp_path / result["mask"]).size == Image.open(photo).size
