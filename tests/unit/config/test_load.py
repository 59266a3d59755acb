"""Configuration files: what is read is what was written, and errors name file, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coupalign.config.load import (
    diff,
    dump,
    flatten,
    numeric_diff,
    override,
    read_config,
    resume_diff,
)
from coupalign.config.schema import Config, DeepSpeedEngine, Source, TimmBackbone
from coupalign.errors import InputError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def write_yaml(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        name="x",
        engine=DeepSpeedEngine(stage=3),
        data={"train": [Source(index="a", split="train")]},
    )

    assert read_config(write_yaml(tmp_path, dump(config))) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_has_a_header(
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
        (
            "cuda_graphs: true\nengine: {kind: deepspeed}",
            ["run.yaml", "DeepSpeed", "engine.kind to ddp"],
        ),
        (
            "engine: {kind: deepspeed, stage: 0, offload: true}",
            ["run.yaml", "engine.offload", "engine.stage 1, 2 or 3"],
        ),
        ("- a list", ["run.yaml", "mapping"]),
        ("a: [", ["run.yaml", "YAML"]),
        ("data: {train: [{index: $NO_SUCH_PLACE/x, split: train}]}", ["NO_SUCH_PLACE", "not set"]),
    ],
)
def test_mistake_names_file_key_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write_yaml(tmp_path, text))

    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data: {mix: leaky}", ["data.mix", "data.leaks", "allow"]),
        ("data: {mix: null}", ["data.mix", "data.leaks", "refuse"]),
        ("data: {leaks: clean}", ["data.leaks", "found 'clean'", "now called 'exclude'"]),
        ("data: {leaks: leaky}", ["data.leaks", "found 'leaky'", "now called 'allow'"]),
        ("model: {sma: {sentence: cls}}", ["model.sma.sentence", "removed", "delete it"]),
    ],
)
def test_key_or_value_of_an_earlier_version_names_the_new_one(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write_yaml(tmp_path, text))

    assert all(part in str(caught.value) for part in ["run.yaml", *parts]), str(caught.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_yaml(tmp_path, "name: x")

    with pytest.raises(InputError, match="run.yaml"):
        read_config(tmp_path / "runn.yaml")


def test_overrides_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/data")
    file = write_yaml(
        tmp_path, "optim: {lr: 5e-5}\ndata: {train: [{index: $PLACE/a, split: train}]}"
    )

    config = read_config(
        file,
        ["engine.kind=deepspeed", "engine.stage=3", "data.train.0.split=val", "optim.clip_norm=1"],
    )

    assert config.engine == DeepSpeedEngine(stage=3)
    assert (config.data.train[0].index, config.data.train[0].split) == ("/data/a", "val")
    assert (config.optim.lr, config.optim.clip_norm) == (5e-5, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train.steps=abc", "override 'train.steps=abc'"),
        ("train", "dotted.key=value"),
        ("data.train.4.split=x", "list of 1"),
        ("train.global_bach=3", "'global_batch'"),
    ],
)
def test_mistake_in_an_override_names_the_override(
    tmp_path: Path, wrong: str, message: str
) -> None:
    file = write_yaml(tmp_path, "data: {train: [{index: a, split: train}]}")

    with pytest.raises(InputError, match=message):
        read_config(file, [wrong])


def test_flatten_diff_and_override_agree() -> None:
    old = Config()

    new = override(old, ["optim.lr=1", "model.proposals.stages=[3, 4]"])

    assert diff(old, new) == {"optim.lr": (5e-5, 1.0), "model.proposals.stages": ([4], [3, 4])}
    assert flatten(new)["optim.lr"] == 1.0
    assert diff(new, new) == {}


@pytest.mark.parametrize(
    ("change", "numeric", "prevents_resuming"),
    [
        # Neither numbers nor checkpoints depend on these.
        ("data.workers=7", False, False),
        ("data.cache_gb=1", False, False),
        ("engine.kind=deepspeed", False, False),
        ("engine.bucket_mb=50", False, False),
        ("tracking.experiment=other", False, False),
        ("tracking.kind=none", False, False),
        ("data.evaluate=[{index: b, split: val}]", False, False),
        ("compile=true", False, False),
        ("cuda_graphs=true", False, False),
        ("model.image.checkpointing=true", False, False),
        ("model.wpa.impl=reference", False, False),
        ("train.max_micro_batch=4", False, False),
        ("evaluate.batch=4", False, False),
        # Another run, but a checkpoint of the old one serves it, too.
        ("train.steps=7", True, False),
        ("train.epochs=7", True, False),
        ("train.evaluate_every=7", True, False),
        ("data.tokenizer=other", True, False),
        ("model.image.weights=other", True, False),
        ("evaluate.protocol=lavt", True, False),
        ("evaluate.limit=4", True, False),
        # Another run from the first step on.
        ("seed=1", True, True),
        ("precision=fp32", True, True),
        ("data.leaks=allow", True, True),
        ("data.train.0.split=val", True, True),
        ("train.global_batch=4", True, True),
        ("train.ema={decay: 0.9}", True, True),
        ("model.kind=lavt", True, True),
        ("optim.lr=1", True, True),
    ],
)
def test_each_setting_says_whether_it_changes_numbers_and_prevents_resuming(
    change: str, numeric: bool, prevents_resuming: bool
) -> None:
    old = Config(data={"train": [Source(index="a", split="train")]})

    new = override(old, [change])

    assert diff(old, new)
    assert bool(numeric_diff(old, new)) == numeric
    assert bool(resume_diff(old, new)) == prevents_resuming


def test_setting_that_changes_no_number_never_prevents_resuming() -> None:
    def check(schema: dict[str, Any]) -> int:
        effects = [field for field in schema.get("properties", {}).values() if "numeric" in field]
        assert all(field["numeric"] or field["resumable"] for field in effects)
        return len(effects)

    schema = Config.model_json_schema()

    assert sum(check(section) for section in [schema, *schema["$defs"].values()]) > 100


def test_every_setting_has_a_description_in_sentences() -> None:
    schema = Config.model_json_schema()
    undescribed = [
        f"{title}.{name}"
        for title, section in [("Config", schema), *schema["$defs"].items()]
        for name, field in section["properties"].items()
        if "numeric" in field and not field["description"].endswith((".", "…"))
    ]

    assert undescribed == []


def test_other_method_keeps_the_encoders_and_nothing_else(tmp_path: Path) -> None:
    file = write_yaml(
        tmp_path,
        "model: {image: {kind: small, widths: [8, 8, 8, 8]}, text: {kind: small}, "
        "decoder: {width: 24}, losses: {dice: 3}}",
    )
    coupalign = read_config(file)

    lavt = read_config(file, ["model.kind=lavt"])

    assert (lavt.model.image, lavt.model.text) == (coupalign.model.image, coupalign.model.text)
    assert (coupalign.model.kind, coupalign.model.decoder.width) == ("coupalign", 24)
    assert (lavt.model.decoder.width, lavt.model.losses.dice) == (512, 0.0)
    assert read_config(file, ["model.kind=coupalign"]) == coupalign
    assert read_config(file, ["model.image.kind=timm"]).model.image == TimmBackbone()


def test_base_gives_what_the_file_does_not_say(tmp_path: Path) -> None:
    write_yaml(
        tmp_path,
        "name: whole\ntrain: {steps: 5}\n"
        "model: {proposals: {count: 9, layers: 1}, text: {kind: small, width: 16}}",
    )
    (tmp_path / "more.yaml").write_text(
        "base: run.yaml\nname: more\nmodel: {proposals: {count: 3}}\n"
    )
    (tmp_path / "rival.yaml").write_text(
        "base: more.yaml\nmodel: {kind: lavt, decoder: {width: 32}}\n"
    )

    more = read_config(tmp_path / "more.yaml")
    rival = read_config(tmp_path / "rival.yaml", ["train.steps=6"])

    assert (more.name, more.train.steps) == ("more", 5)
    assert (more.model.proposals.count, more.model.proposals.layers) == (3, 1)
    assert (rival.name, rival.train.steps) == ("more", 6)
    assert (rival.model.kind, rival.model.decoder.width) == ("lavt", 32)
    assert rival.model.text == more.model.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: loop.yaml", "leads back"),
        ("base: nowhere.yaml", "nowhere.yaml: no such file"),
        ("base: [1]", "a YAML file in the same folder"),
    ],
)
def test_wrong_base_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loop.yaml").write_text(text)

    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "loop.yaml")
