"""Kept pictures: the list that lies beside them, what is drawn, what the model looked at, and damage that is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.schema import CoupAlignConfig, DataConfig, LavtConfig
from coupalign.data.tokenizer import SPECIAL, Tokenizer
from coupalign.errors import InputError
from coupalign.evaluation.protocols import boundary
from coupalign.model.build import build_model
from coupalign.report.explanations import build_explainer
from coupalign.report.pictures import read_pictures, save_pictures
from tests.unit.report.examples import evaluation_of

ENCODERS = {
    "image": {"kind": "small", "widths": [16, 16, 32, 32]},
    "text": {"kind": "small", "width": 32, "layers": 4, "heads": 2},
}


def test_pictures_come_back(tmp_path: Path):
    evaluation = evaluation_of()
    files = save_pictures(tmp_path / "val", evaluation, 2)
    groups = read_pictures(tmp_path / "val")
    assert {group: len(entries) for group, entries in groups.items()} == {
        "random": 2,
        "best": 2,
        "median": 2,
        "worst": 2,
    }
    assert len(files) == 8 and all(file.is_file() for file in files)
    assert [kept.iou for kept in groups["best"]] == sorted(
        (kept.iou for kept in groups["best"]), reverse=True
    )
    save_pictures(tmp_path / "val", evaluation_of(2), 1)
    assert len(list((tmp_path / "val").iterdir())) == 4 + 1
    assert read_pictures(tmp_path / "none") == {}


def test_the_list_says_what_the_samples_are(tmp_path: Path):
    evaluation = evaluation_of()
    save_pictures(tmp_path / "val", evaluation, 8)
    pictures = {picture.name: picture for picture in evaluation.pictures}
    for kept in read_pictures(tmp_path / "val")["best"]:
        picture = pictures[kept.name]
        bands = [boundary(torch.from_numpy(mask)) for mask in (picture.truth, picture.prediction)]
        edges = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
        assert (kept.sentence, kept.area, kept.pixels) == (
            picture.sentence,
            picture.truth.sum(),
            picture.truth.size,
        )
        assert kept.same_class == picture.same_class and kept.why == ""
        assert kept.iou == pytest.approx(picture.iou, abs=1e-6) and kept.boundary == pytest.approx(
            edges.item(), abs=1e-6
        )
        with Image.open(tmp_path / "val" / kept.file) as drawn:
            heading, panels = (
                np.asarray(drawn)[rows] for rows in (slice(kept.heading), slice(kept.heading, None))
            )
        assert (
            np.ptp(heading.astype(int), axis=2).max() <= 10
            and np.ptp(panels.astype(int), axis=2).max() > 100
        )


def test_the_first_of_each_group_are_explained(tmp_path: Path):
    asked = []

    def explain(picture):
        asked.append(picture.number)
        return Image.fromarray(picture.image) if picture.number % 2 else None

    files = save_pictures(
        tmp_path / "val", evaluation_of(), 3, explain=explain, explained_per_group=2
    )
    groups = read_pictures(tmp_path / "val")
    assert len(asked) == 4 * 2 and all(
        not kept.why for entries in groups.values() for kept in entries[2:]
    )
    whys = [
        tmp_path / "val" / kept.why for entries in groups.values() for kept in entries if kept.why
    ]
    assert 0 < len(whys) < 8 and set(whys) < set(files)


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_a_model_is_explained_on_the_photograph(resize: str, tmp_path: Path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*SPECIAL, *"left one man a cup dark dog red star the second".split()]) + "\n"
    )
    tokenizer = Tokenizer.open(tmp_path / "vocab.txt")
    data = DataConfig.model_validate(
        {
            "train": [{"index": "shards", "split": "train"}],
            "image_size": 64,
            "max_tokens": 8,
            "resize": resize,
        }
    )
    config = CoupAlignConfig.model_validate(
        {**ENCODERS, "decoder": {"width": 32}, "proposals": {"count": 3, "layers": 1, "ffn": 32}}
    )
    picture = evaluation_of().pictures[1]  # "left one": four tokens
    draw = build_explainer(build_model(config, len(tokenizer), 64).eval(), tokenizer, data)
    sheet = draw(picture)
    rows = 1 + 4  # the proposals, and four stages of one row of words
    assert sheet.width == 4 * 160 + 5 * 8 and rows * 107 < sheet.height < rows * 180
    assert np.array_equal(np.asarray(draw(picture)), np.asarray(sheet))
    lavt = build_model(
        LavtConfig.model_validate({**ENCODERS, "kind": "lavt", "decoder": {"width": 16}}),
        len(tokenizer),
        64,
    )
    assert build_explainer(lavt.eval(), tokenizer, data)(picture) is None


def test_damaged_pictures_are_named(tmp_path: Path):
    files = save_pictures(
        tmp_path / "val", evaluation_of(), 1, explain=lambda picture: Image.fromarray(picture.image)
    )
    for file in files[:2]:  # a strip and an explanation
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=file.name):
            read_pictures(tmp_path / "val")
        file.write_bytes(content)
    path = tmp_path / "val" / "pictures.json"
    first = json.loads(path.read_text())[0]
    for damage in ([{}], [{"group": "best"}], {"a": 1}, [{**first, "area": "x"}]):
        path.write_text(json.dumps(damage))
        with pytest.raises(InputError, match=r"pictures\.json"):
            read_pictures(tmp_path / "val")
