"""Configuration files: what is read is what was written, and every mistake is named with file, key and remedy."""
from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.load import diff, dump, flatten, override, read_config
from coupalign.config.schema import Config, DeepSpeedEngine, Source
from coupalign.errors import InputError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Config(name="x", engine=DeepSpeedEngine(stage=3), data={"train": [Source(index="a", split="train")]})
    assert read_config(written(tmp_path, dump(config))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_has_a_header(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", "/weights")
    monkeypatch.setenv("SHARDS", "/shards")
    assert read_config(path).name == path.stem
    assert path.read_text(encoding="utf-8").startswith("#"), "the header says command, hardware and expected score"


@pytest.mark.parametrize(("text", "parts"), [
    ("optim: {lr_imge: 1}", ["run.yaml", "optim.lr_imge", "'lr_image'"]),
    ("model: {image: {kind: small, width: 3}}", ["model.image.width", "'widths'"]),
    ("model: {proposals: {count: many}}", ["model.proposals.count", "integer", "many"]),
    ("engine: {kind: deepsped}", ["run.yaml", "engine", "deepsped", "'deepspeed'"]),
    ("train: {steps: 1}\ntrain: {steps: 2}", ["run.yaml", "train", "twice"]),
    ("train: {epochs: null}", ["run.yaml", "how long to train"]),
    ("- a list", ["run.yaml", "mapping"]),
    ("a: [", ["run.yaml", "YAML"]),
    ("data: {train: [{index: $NO_SUCH_PLACE/x, split: train}]}", ["NO_SUCH_PLACE", "not set"]),
])
def test_a_mistake_names_file_key_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_config(written(tmp_path, text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "name: x")
    with pytest.raises(InputError, match="run.yaml"):
        read_config(tmp_path / "runn.yaml")


def test_overrides_win_and_their_mistakes_are_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    file = written(tmp_path, "optim: {lr: 5e-5}\ndata: {train: [{index: $PLACE/a, split: train}]}")
    config = read_config(file, ["engine.kind=deepspeed", "engine.stage=3", "data.train.0.split=val", "optim.clip_norm=1"])
    assert (config.engine, config.data.train[0].split) == (DeepSpeedEngine(stage=3), "val")
    assert (config.optim.lr, config.optim.clip_norm, config.data.train[0].index) == (5e-5, 1.0, "/data/a")
    for wrong, part in [("train.steps=abc", "override 'train.steps=abc'"), ("train", "dotted.key=value"),
                        ("data.train.4.split=x", "list of 1"), ("train.global_bach=3", "'global_batch'")]:
        with pytest.raises(InputError, match=part):
            read_config(file, [wrong])


def test_flatten_diff_and_override_agree() -> None:
    old = Config()
    new = override(old, ["optim.lr=1", "model.proposals.stages=[3, 4]"])
    assert diff(old, new) == {"optim.lr": (5e-5, 1.0), "model.proposals.stages": ([4], [3, 4])}
    assert flatten(new)["optim.lr"] == 1.0
    assert diff(new, new) == {}
