"""Configuration files: what is read is what was written, and every mistake is named with file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.load import diff, dump, flatten, override, read_config
from coupalign.config.schema import Config, DeepSpeedEngine, Source, TimmBackbone
from coupalign.errors import InputError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        name="x",
        engine=DeepSpeedEngine(stage=3),
        data={"train": [Source(index="a", split="train")]},
    )
    assert read_config(written(tmp_path, dump(config))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_has_a_header(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTS", "/weights")
    monkeypatch.setenv("SHARDS", "/shards")
    assert read_config(path).name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#"), (
        "the header says command, hardware and expected score"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lr_imge: 1}", ["run.yaml", "optim.lr_imge", "'lr_image'"]),
        ("model: {image: {kind: small, width: 3}}", ["model.image.width", "'widths'"]),
        ("model: {proposals: {count: many}}", ["model.proposals.count", "integer", "many"]),
        ("engine: {kind: deepsped}", ["run.yaml", "engine", "deepsped", "'deepspeed'"]),
        ("train: {steps: 1}\ntrain: {steps: 2}", ["run.yaml", "train", "twice"]),
        ("train: {epochs: null}", ["run.yaml", "how long to train"]),
        (
            "compile: true\nengine: {kind: deepspeed, stage: 3}",
            ["run.yaml", "ZeRO 3", "engine.stage to 2"],
        ),
        (
            "compile: true\nmodel: {text: {kind: bert, checkpointing: selective}}",
            ["run.yaml", "selective", "compile to false"],
        ),
        ("- a list", ["run.yaml", "mapping"]),
        ("a: [", ["run.yaml", "YAML"]),
        ("data: {train: [{index: $NO_SUCH_PLACE/x, split: train}]}", ["NO_SUCH_PLACE", "not set"]),
    ],
)
def test_a_mistake_names_file_key_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_config(written(tmp_path, text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "name: x")
    with pytest.raises(InputError, match="run.yaml"):
        read_config(tmp_path / "runn.yaml")


def test_overrides_win_and_their_mistakes_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "/data")
    file = written(tmp_path, "optim: {lr: 5e-5}\ndata: {train: [{index: $PLACE/a, split: train}]}")
    config = read_config(
        file,
        ["engine.kind=deepspeed", "engine.stage=3", "data.train.0.split=val", "optim.clip_norm=1"],
    )
    assert (config.engine, config.data.train[0].split) == (DeepSpeedEngine(stage=3), "val")
    assert (config.optim.lr, config.optim.clip_norm, config.data.train[0].index) == (
        5e-5,
        1.0,
        "/data/a",
    )
    for wrong, part in [
        ("train.steps=abc", "override 'train.steps=abc'"),
        ("train", "dotted.key=value"),
        ("data.train.4.split=x", "list of 1"),
        ("train.global_bach=3", "'global_batch'"),
    ]:
        with pytest.raises(InputError, match=part):
            read_config(file, [wrong])


def test_flatten_diff_and_override_agree() -> None:
    old = Config()
    new = override(old, ["optim.lr=1", "model.proposals.stages=[3, 4]"])
    assert diff(old, new) == {"optim.lr": (5e-5, 1.0), "model.proposals.stages": ([4], [3, 4])}
    assert flatten(new)["optim.lr"] == 1.0
    assert diff(new, new) == {}


def test_another_method_keeps_the_encoders_and_nothing_else(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "model: {image: {kind: small, widths: [8, 8, 8, 8]}, text: {kind: small}, decoder: {width: 24}, "
        "losses: {dice: 3}}",
    )
    plain, lavt = read_config(file), read_config(file, ["model.kind=lavt"])
    assert (lavt.model.image, lavt.model.text) == (plain.model.image, plain.model.text)
    assert (plain.model.kind, lavt.model.decoder.width, lavt.model.losses.dice) == (
        "coupalign",
        512,
        0.0,
    )
    assert read_config(file, ["model.kind=coupalign"]) == plain
    assert read_config(file, ["model.image.kind=timm"]).model.image == TimmBackbone()


def test_a_base_is_the_file_with_what_differs(tmp_path: Path) -> None:
    written(
        tmp_path,
        "name: whole\nmodel: {proposals: {count: 9, layers: 1}, text: {kind: small, width: 16}}\ntrain: {steps: 5}",
    )
    (tmp_path / "more.yaml").write_text(
        "base: run.yaml\nname: more\nmodel: {proposals: {count: 3}}\n"
    )
    (tmp_path / "rival.yaml").write_text(
        "base: more.yaml\nmodel: {kind: lavt, decoder: {width: 32}}\n"
    )
    more, rival = (
        read_config(tmp_path / "more.yaml"),
        read_config(tmp_path / "rival.yaml", ["train.steps=6"]),
    )
    assert (
        more.name,
        more.train.steps,
        more.model.proposals.count,
        more.model.proposals.layers,
    ) == ("more", 5, 3, 1)
    assert (rival.name, rival.train.steps, rival.model.kind, rival.model.decoder.width) == (
        "more",
        6,
        "lavt",
        32,
    )
    assert rival.model.text == more.model.text
    for text, named in (
        ("base: loop.yaml", "leads back"),
        ("base: nowhere.yaml", "nowhere.yaml: no such file"),
        ("base: [1]", "a YAML file beside it"),
    ):
        (tmp_path / "loop.yaml").write_text(text)
        with pytest.raises(InputError, match=named):
            read_config(tmp_path / "loop.yaml")
