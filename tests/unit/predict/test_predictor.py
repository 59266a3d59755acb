"""A trained model at work: one pair, many pairs, files of pairs, and every way in which a checkpoint or a file can be wrong."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import coupalign
from coupalign.cli.parser import main
from coupalign.config.load import dump
from coupalign.config.schema import Config, Source
from coupalign.data.build import build_eval_loader
from coupalign.data.packing.vocabulary import train_vocabulary
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.rows import read_rows
from coupalign.model.build import build_model
from coupalign.model.weights.load import write_weights
from coupalign.predict import predictor as predict
from coupalign.predict.predictor import Predictor, in_order, open_image
from coupalign.scoring.checkpoint import score_checkpoint
from coupalign.scoring.splits import ScoreRequest

WORDS = ["small red star", "the blue square on the left", "second circle from the right"]


def tiny_config(width: int = 32, resize: str = "squash") -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "precision": "fp32",
            "data": {"image_size": 64, "max_tokens": 20, "resize": resize},
            "model": {
                "image": {"kind": "small", "widths": [8, 8, 8, 8]},
                "text": {"kind": "small", "width": 16, "layers": 4, "heads": 2},
                "decoder": {"width": width},
                "proposals": {"count": 4, "layers": 1, "heads": 2, "ffn": 16},
            },
        }
    )


def write_checkpoint(
    folder: Path, config: Config, seed: int = 0, average: float | None = None
) -> Path:
    """A checkpoint directory of a random model; `average` fills ema.safetensors with the weights times that."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    train_vocabulary(WORDS, folder / "vocabulary.txt", 100)
    tokenizer = Tokenizer.open(str(folder / "vocabulary.txt"))
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(seed)
    model = build_model(config.model, len(tokenizer), config.data.image_size)
    torch.nn.init.normal_(
        model.head.classify.weight, std=2.0
    )  # so that some pixels are foreground and some are not
    torch.nn.init.zeros_(model.head.classify.bias)
    state = model.state_dict()
    write_weights(folder / "weights.safetensors", state)
    if average is not None:
        averaged = {
            name: value * average for name, value in state.items() if value.is_floating_point()
        }
        write_weights(folder / "ema.safetensors", averaged)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(folder / "checkpoints" / "step-00000010", tiny_config())
    (folder / "checkpoints" / "best").symlink_to("step-00000010")
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.from_checkpoint(run, "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of several sizes and modes in a folder."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, shape, mode in (
        ("wide.jpg", (40, 90, 3), "RGB"),
        ("tall.png", (70, 30, 3), "RGB"),
        ("gray.png", (33, 44), "L"),
    ):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / name)
    return folder


def same(left, right, tolerance: float = 0.0) -> bool:
    return (
        left.mask.shape == right.mask.shape
        and float(np.abs(left.probability - right.probability).max()) <= tolerance
    )


# ------------------------------------------------------------------------------------------------- one and many


def test_a_prediction_fits_together(predictor: Predictor, photos: Path):
    for name, shape in (("wide.jpg", (40, 90)), ("tall.png", (70, 30)), ("gray.png", (33, 44))):
        result = predictor.predict(photos / name, WORDS[0])
        assert result.mask.shape == result.probability.shape == shape
        assert result.mask.dtype == bool and result.probability.dtype == np.float32
        assert (
            result.mask == (result.probability > 0.5)
        ).all() and result.area == result.mask.sum()
        assert (
            0 <= result.probability.min()
            and result.probability.max() <= 1
            and 0 < result.area < result.mask.size
        )
        x0, y0, x1, y1 = result.box
        outside = result.mask.copy()
        outside[y0:y1, x0:x1] = False
        assert not outside.any() and result.mask[y0].any() and result.mask[y1 - 1].any()
        assert result.mask[:, x0].any() and result.mask[:, x1 - 1].any()
        assert result.score == pytest.approx(result.probability[result.mask].mean(), abs=1e-6)
        json.dumps(result.to_json())


def test_an_empty_mask_has_no_box(run: Path, photos: Path):
    predictor = Predictor.from_checkpoint(run, "cpu")
    predictor.model.register_forward_hook(lambda module, inputs, logits: -logits.abs() - 1)
    result = predictor.predict(photos / "wide.jpg", WORDS[0])
    assert (result.box, result.area, result.score) == (None, 0, 0.0)


def test_paths_pictures_and_arrays_give_the_same(predictor: Predictor, photos: Path):
    path = photos / "tall.png"
    expected = predictor.predict(path, WORDS[1])
    with Image.open(path) as opened:
        for other in (str(path), opened, np.asarray(opened)):
            assert same(predictor.predict(other, WORDS[1]), expected)


def test_gray_means_three_equal_colors(predictor: Predictor, photos: Path):
    gray = np.asarray(Image.open(photos / "gray.png"))
    assert same(
        predictor.predict(gray, WORDS[0]),
        predictor.predict(np.stack([gray] * 3, axis=-1), WORDS[0]),
    )


def test_exif_orientation_is_followed(predictor: Predictor, photos: Path, tmp_path: Path):
    upright = Image.open(photos / "tall.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    assert same(
        predictor.predict(tmp_path / "lying.png", WORDS[0]), predictor.predict(upright, WORDS[0])
    )


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_do_not_matter(predictor: Predictor, photos: Path, batch: int):
    pairs = [(path, sentence) for path in sorted(photos.iterdir()) for sentence in WORDS]
    many = list(predictor.predict_many(iter(pairs), batch))
    assert [result.sentence for result in many] == [sentence for _, sentence in pairs]
    for pair, result in zip(pairs, many):
        assert same(result, predictor.predict(*pair), tolerance=1e-5)


def test_the_package_itself_loads_a_run(run: Path, predictor: Predictor, photos: Path):
    image = photos / "wide.jpg"
    assert same(
        coupalign.load(run, "cpu").predict(image, WORDS[0]), predictor.predict(image, WORDS[0])
    )


def test_letterbox_reads_only_the_photograph(tmp_path: Path, photos: Path):
    predictor = Predictor.from_checkpoint(
        write_checkpoint(tmp_path / "c", tiny_config(resize="letterbox")), "cpu"
    )
    assert predictor.predict(photos / "wide.jpg", WORDS[0]).mask.shape == (40, 90)


def test_the_end_of_a_sentence_does_not_matter_but_its_length_is_told(
    predictor: Predictor, photos: Path
):
    image = photos / "gray.png"
    plain = predictor.predict(image, "small red star")
    assert same(predictor.predict(image, "  small  red\nstar. "), plain) and not plain.cut
    assert predictor.predict(image, "star " * 30).cut


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_masks_are_those_that_were_scored(shards: Path, tmp_path: Path, precision: str):
    config = tiny_config()
    data = config.data.model_copy(
        update={"evaluate": (Source(index=str(shards), split="val"),), "workers": 0}
    )
    evaluate = config.evaluate.model_copy(update={"batch": 3, "bootstrap": 0})
    config = config.model_copy(update={"data": data, "precision": precision, "evaluate": evaluate})
    run = write_checkpoint(tmp_path / "run" / "checkpoints" / "best", config).parents[1]
    score_checkpoint(run, request=ScoreRequest(protocols=["ris-v1"]))
    rows = read_rows(run / "scores" / "val-ris-v1.csv").counts[:, 1:3].tolist()
    predictor = Predictor.from_checkpoint(run, "cpu")
    infos = [
        info
        for batch in build_eval_loader(
            config.data,
            data.evaluate,
            batch=3,
            world=World(0, 1, 0, 1, torch.device("cpu")),
            tokenizer=predictor.tokenizer,
            images=True,
        )
        for info in batch.info
    ]
    masks = [
        result.mask
        for result in predictor.predict_many([(info.image, info.sentence) for info in infos], 3)
    ]
    assert rows == [
        [(mask & info.truth).sum(), (mask | info.truth).sum()] for mask, info in zip(masks, infos)
    ]
    other = Predictor(
        config.model_copy(update={"precision": "fp32"}),
        predictor.model,
        predictor.tokenizer,
        predictor.device,
    )
    same_masks = all(
        (other.predict(info.image, info.sentence).mask == mask).all()
        for info, mask in zip(infos, masks)
    )
    assert same_masks is (precision == "fp32"), "the precision would make no difference"


# -------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("sentence", ["", "  \n", "?!"])
def test_a_sentence_without_words_is_refused(predictor: Predictor, photos: Path, sentence: str):
    with pytest.raises(InputError, match="holds no words"):
        predictor.predict(photos / "gray.png", sentence)


def test_what_is_no_image_is_refused(tmp_path: Path, photos: Path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])
    for name in ("none.jpg", "text.jpg", "cut.jpg", "."):
        with pytest.raises(InputError, match="cannot be read as an image"):
            open_image(tmp_path / name)
    for array in (
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(InputError, match="uint8"):
            open_image(array)


@pytest.mark.parametrize("device", ["gpu7", "cuda:63"])
def test_an_absent_device_is_refused(run: Path, device: str):
    with pytest.raises(InputError, match=device):
        Predictor.from_checkpoint(run, device)


# --------------------------------------------------------------------------------------------------- checkpoints


def test_the_best_checkpoint_is_taken_else_the_newest(tmp_path: Path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", tiny_config())
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".step-00000200.partial").mkdir()
    assert find_checkpoint(tmp_path / "run").resolve().name == "step-00000100"
    (folder / "best").symlink_to("step-00000009")
    for path in (tmp_path / "run", folder):
        assert find_checkpoint(path).resolve().name == "step-00000009"
    assert find_checkpoint(folder / "step-00000010").name == "step-00000010"
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-00000001")
    assert find_checkpoint(tmp_path / "run").resolve().name == "step-00000100"


def test_averaged_weights_are_preferred(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "c", tiny_config(), average=0.5)
    plain = load_file(folder / "weights.safetensors")
    _, model, _ = open_checkpoint(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain[name] * 0.5 if value.is_floating_point() else plain[name])


def test_a_checkpoint_of_another_model_names_the_tensors(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "c", tiny_config(width=32))
    (folder / "config.yaml").write_text(dump(tiny_config(width=48)))
    with pytest.raises(
        InputError, match=r"(?s)weights\.safetensors.*another model.*decoder\..*32.*48"
    ):
        open_checkpoint(folder)


def test_a_missing_tensor_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    state = load_file(folder / "weights.safetensors")
    gone = sorted(state)[3]
    write_weights(
        folder / "weights.safetensors",
        {name: value for name, value in state.items() if name != gone},
    )
    with pytest.raises(InputError, match=gone.replace(".", r"\.")):
        open_checkpoint(folder)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="weights.safetensors"):
        open_checkpoint(folder)


def test_a_directory_without_checkpoint_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"no checkpoint here.*notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        open_checkpoint(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ files of pairs


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    if path.suffix == ".csv":
        path.write_text(
            "sentence,image\n" + "".join(f'"{sentence}",{image}\n' for image, sentence in pairs)
        )
    else:
        path.write_text(
            "".join(
                json.dumps({"image": image, "sentence": sentence}) + "\n\n"
                for image, sentence in pairs
            )
        )
    return path


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
def test_a_file_of_pairs(predictor: Predictor, photos: Path, tmp_path: Path, name: str):
    (tmp_path / "photos").symlink_to(photos)
    sentences = ["small red star", "star, left", "caf\u00e9 \u2028 square"]
    pairs = list(zip(["photos/wide.jpg", "photos/gray.png", "photos/wide.jpg"], sentences))
    results = predictor.predict_file(write_pairs(tmp_path / name, pairs), tmp_path / "out", batch=2)
    assert [
        json.loads(line)
        for line in (tmp_path / "out" / "results.jsonl").read_text().rstrip("\n").split("\n")
    ] == results
    expected = {
        f"{stem}.{kind}.png"
        for stem in ("wide-1", "gray-2", "wide-3")
        for kind in ("mask", "overlay")
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | {"results.jsonl"}
    for (image, sentence), result in zip(pairs, results):
        assert (result["image"], result["sentence"]) == (image, sentence)
        mask = np.asarray(Image.open(tmp_path / "out" / result["mask"]))
        again = predictor.predict(tmp_path / image, sentence)
        assert (
            mask.dtype == np.uint8
            and (mask == again.mask * 255).all()
            and result["area"] == again.area
        )
        assert Image.open(tmp_path / "out" / result["overlay"]).size == (
            mask.shape[1],
            mask.shape[0],
        )


def test_one_pair_to_files(predictor: Predictor, photos: Path, tmp_path: Path):
    result = predictor.predict_to(photos / "tall.png", WORDS[2], tmp_path / "out")
    assert (result["mask"], result["overlay"]) == ("tall.mask.png", "tall.overlay.png")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tall.mask.png",
        "tall.overlay.png",
    }
    assert result["height"], result["width"] == (70, 30)


def test_a_damaged_image_names_the_line_and_no_results_are_written(
    predictor: Predictor, photos: Path, tmp_path: Path
):
    (tmp_path / "bad.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])
    (tmp_path / "wide.jpg").symlink_to(photos / "wide.jpg")
    pairs = write_pairs(tmp_path / "pairs.csv", [("wide.jpg", "star"), ("bad.jpg", "star")])
    with pytest.raises(InputError, match=r"pairs\.csv: line 3: .*bad\.jpg: cannot be read"):
        predictor.predict_file(pairs, tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- folders


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def test_a_folder_and_a_sentence(predictor: Predictor, photos: Path, tmp_path: Path):
    results = predictor.predict_folder(photos, WORDS[0], tmp_path / "out", batch=2)
    assert results == lines_of(tmp_path / "out") and [result["image"] for result in results] == [
        "gray.png",
        "tall.png",
        "wide.jpg",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl",
        *(
            f"{stem}.{kind}.png"
            for stem in ("gray", "tall", "wide")
            for kind in ("mask", "overlay")
        ),
    }
    for result in results:
        again = predictor.predict(photos / result["image"], WORDS[0])
        assert (np.asarray(Image.open(tmp_path / "out" / result["mask"])) == again.mask * 255).all()


def test_an_unreadable_image_of_a_folder_is_passed_over_by_name(
    run: Path,
    photos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "c.JPG", ".hidden.png", "notes.txt"):
        (folder / name).symlink_to(photos / "wide.jpg")
    (folder / "b.jpg").write_bytes((photos / "wide.jpg").read_bytes()[:600])
    (folder / "deeper.png").mkdir()
    with caplog.at_level(logging.WARNING):
        assert (
            main(
                [
                    "predict",
                    str(run),
                    str(folder),
                    WORDS[0],
                    "--out",
                    str(out),
                    "--batch",
                    "1",
                    "--device",
                    "cpu",
                    "--json",
                ]
            )
            == 1
        )
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results == lines_of(out) and [result["image"] for result in results] == [
        "a.jpg",
        "a.png",
        "b.jpg",
        "c.JPG",
    ]
    assert [result.get("mask") for result in results] == [
        "a.jpg.mask.png",
        "a.png.mask.png",
        None,
        "c.mask.png",
    ]
    assert (
        set(results[2]) == {"image", "sentence", "error"}
        and "b.jpg: cannot be read as an image" in results[2]["error"]
    )
    [warning] = [
        record.getMessage() for record in caplog.records if "skipped" in record.getMessage()
    ]
    assert "b.jpg" in warning and "repair or remove it" in warning
    assert len(list(out.iterdir())) == 7


def test_a_folder_for_its_own_masks_or_without_a_sentence_is_refused(
    predictor: Predictor, run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(InputError, match="give another folder with --out"):
        predictor.predict_folder(photos, WORDS[0], photos / ".." / photos.name)
    assert main(["predict", str(run), str(photos)]) == 2
    assert "a sentence is expected after an image or a folder" in capsys.readouterr().err
    assert main(["predict", str(run), str(photos), WORDS[0], "--batch", "0"]) == 2


def test_images_are_opened_ahead_and_files_written_behind_the_model(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model's first batch is not done before the second image is open, nor the first file before the second batch was asked."""
    predictor = Predictor.from_checkpoint(run, "cpu")
    second_open, second_asked = threading.Event(), threading.Event()
    opened, asked, overlapped = [], [], []
    open_one, save = predict.open_image, predict.save_png

    def open_and_tell(image):
        opened.append(image)
        if len(set(map(str, opened))) == 2:
            second_open.set()
        return open_one(image)

    def forward(*_):
        asked.append(len(asked))
        overlapped.append(second_open.wait(30)) if len(asked) == 1 else second_asked.set()

    def save_late(path, picture, **options):
        if path.name.startswith("gray"):
            overlapped.append(second_asked.wait(30))
        save(path, picture, **options)

    monkeypatch.setattr(predict, "_threads", lambda: 2)
    monkeypatch.setattr(predict, "open_image", open_and_tell)
    monkeypatch.setattr(predict, "save_png", save_late)
    predictor.model.register_forward_hook(forward)
    predictor.predict_folder(photos, WORDS[0], tmp_path / "out", batch=1)
    assert overlapped == [True, True, True] and len(asked) == 3


def test_work_ahead_is_bounded_and_in_order():
    begun: list[int] = []
    items = (begun.append(number) or number for number in range(20))
    with ThreadPoolExecutor(4) as pool:
        for place, value in enumerate(in_order(pool, lambda number: -number, items, 3)):
            assert value == -place and len(begun) <= place + 4
        assert list(in_order(pool, abs, [], 3)) == []
        with pytest.raises(ZeroDivisionError):
            list(in_order(pool, lambda number: 1 / number, [2, 1, 0], 1))


def test_real_photographs(predictor: Predictor, real_data: Path, tmp_path: Path):
    photos = sorted((real_data / "coco_pool" / "images" / "train2014").glob("*.jpg"))[:4]
    for photo in photos:
        result = predictor.predict_to(photo, "the person on the left", tmp_path)
        assert Image.open(tmp_path / result["mask"]).size == Image.open(photo).size
