"""Configuration files: what is read is what was written, and errors name file, key and remedy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.config.load import (
    diff,
    dump,
    flatten,
    numeric_diff,
    override,
    read_config,
    read_stored_config,
    read_yaml,
    resume_diff,
)
from coupalign.config.schema import Config, DeepSpeedEngine, Source, TimmBackbone
from coupalign.config.yaml_text import parse_value, to_yaml
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
        ("model: {kind: lavt, lavt: 1}", ["run.yaml", "unknown key 'model.lavt'"]),
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


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("008", 8), ("0o10", 8), ("0x10", 16), ("1e-3", 0.001), ("+7", 7), ("-.5", -0.5)],
)
def test_number_in_a_file_and_in_an_override_is_the_one_that_is_written(
    tmp_path: Path, text: str, value: float
) -> None:
    file = write_yaml(tmp_path, f"optim: {{weight_decay: {text.replace('-.5', '0.5')}}}")

    in_file = read_config(file).optim.weight_decay

    assert in_file == abs(value)
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["1:30", "1_000", "true", "3.0", ".inf", "010.5", "yes", "0b11"])
def test_word_that_is_no_whole_number_is_refused_as_one(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="train.global_batch"):
        read_config(write_yaml(tmp_path, "name: x"), [f"train.global_batch={text}"])


@pytest.mark.parametrize("text", ["no", "on", "yes", "2026-01-01", "1:30", "0b11", "='", "a:b"])
def test_word_stays_a_word(tmp_path: Path, text: str) -> None:
    config = read_config(write_yaml(tmp_path, f"tracking: {{kind: mlflow, experiment: {text}}}"))

    assert config.tracking.experiment == text
    assert override(config, [f"tracking.experiment={text}"]) == config


def test_leading_tilde_is_the_home_folder_in_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/$me")
    file = write_yaml(
        tmp_path,
        "run_dir: ~/out\nmodel:\n"
        "  text: {kind: bert, weights: 'random:~/bert'}\n  image: {kind: timm}\n"
        "tracking: {kind: mlflow, uri: 'sqlite:///~/mlflow.db'}\n"
        "data: {cache_dir: '~', tokenizer: ~/words, train: [{index: ~/a~/b, split: train}]}",
    )

    config = read_config(file, ["model.image.weights=~/swin.pth"])

    assert config.run_dir == Path("/home/$me/out")
    assert config.model.text.weights == "random:/home/$me/bert"
    assert config.model.image.weights == "/home/$me/swin.pth"
    assert config.tracking.uri == "sqlite:////home/$me/mlflow.db"
    assert (config.data.cache_dir, config.data.tokenizer) == (Path("/home/$me"), "/home/$me/words")
    assert config.data.train[0].index == "/home/$me/a~/b"
    with pytest.raises(InputError, match="no home folder is known for ~nobody-here"):
        read_config(file, ["run_dir=~nobody-here/out"])


def test_variable_is_expanded_once_and_a_dollar_sign_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "/data/$word/${x}")
    monkeypatch.setenv("EMPTY", "")
    file = write_yaml(tmp_path, "run_dir: ${PLACE}/$$a\ndata: {tokenizer: $PLACE}")

    config = override(read_config(file), ["name=b"])

    assert config.run_dir == Path("/data/$word/${x}/$a")
    assert config.data.tokenizer == "/data/$word/${x}"
    assert read_config(write_yaml(tmp_path, dump(config))) == config
    for wrong, message in [("$EMPTY/a", "is empty"), ("${PLACE", "write .NAME"), ("a$", "write")]:
        with pytest.raises(InputError, match=message):
            read_config(file, [f"data.tokenizer={wrong}"])


def test_stored_configuration_is_read_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("HOME", "/home/me")
    foreign = write_yaml(
        tmp_path, "run_dir: ~/x\ntracking: {kind: mlflow, uri: 'http://evil/$SECRET'}"
    )

    stored = read_stored_config(foreign)

    assert (stored.run_dir, stored.tracking.uri) == (Path("~/x"), "http://evil/$SECRET")
    assert override(stored, ["name=y"]).tracking.uri == "http://evil/$SECRET"
    assert read_stored_config(write_yaml(tmp_path, dump(stored))) == stored
    with pytest.raises(InputError, match="unknown key 'base'"):
        read_stored_config(write_yaml(tmp_path, "base: /etc/passwd"))


@pytest.mark.parametrize(
    "wrong",
    [
        "tracking.uri=postgresql://mlflow:hunter2@host/db",
        "tracking.uri=http://hunter2token@host",
        "data.train.0.index=http://reader:hunter2@host/shards",
        "data.train.0.index=https://host/shards?sig=hunter2",
        "data.evaluate=[{index: 'http://reader:hunter2@host/shards', split: val}]",
        "data.evaluate={index: 'http://reader:hunter2@host/shards'}",
        "data.tokenizer=https://host/a?token=hunter2",
        "model.text.weights=https://u:hunter2@host/a",
        "model.image.weights=https://u:hunter2@host/a",
        "model.image.weihgts=https://u:hunter2@host/a",
        "tracking.uri=[http://u:hunter2@host",
        "http://u:hunter2@host",
        "tracking.uri=http://u:hunter2@$NO_SUCH_HOST",
        "data.train.http://u:hunter2@host=1",
        "seed=http://u:hunter2@host",
    ],
)
def test_secret_in_an_address_is_refused_and_not_repeated(tmp_path: Path, wrong: str) -> None:
    file = write_yaml(tmp_path, "data: {train: [{index: a, split: train}]}")

    with pytest.raises(InputError) as caught:
        read_config(file, [wrong])

    assert "hunter2" not in str(caught.value)


def test_secret_in_an_address_is_refused_with_the_other_ways(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tracking.uri: the address holds a password.*\.netrc"):
        read_config(write_yaml(tmp_path, "tracking: {kind: mlflow, uri: 'http://u:hunter2@host'}"))


LISTS_OF_LISTS = "\n".join(
    ["a0: &a0 [z, z, z, z, z, z, z, z, z]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system [exit]", "line 1: the tag"),
        ("name: !!binary aGVsbG8=", "line 1: the tag"),
        ("name: !!int abc", "cannot be read as int"),
        (LISTS_OF_LISTS, "more than 20000 values"),
        ("name: &a [*a]", "more than 64 levels"),
        ("data: &a {train: *a}", "more than 64 levels"),
        ("name: " + "[" * 5000, "more than 64 levels"),
        ("- " * 100_000 + "a", "more than 64 levels"),
        ("? [a, b]\n: 1", "expected a name as the key, found a list"),
        ("1: 2", "line 1: expected a name as the key, found '1'"),
        ("a: &x {b: 1}\n<<: *x", "unknown key '<<'"),
        ('name: x\n"\\ud800": 1', "line 2: the character"),
        ('name: "\\0"', "is not allowed"),
        ("seed: " + "9" * 26, "seed: "),
        ("seed: " + "9" * 5000, "cannot be read as int"),
        ("train: {steps: 1.0e+400}", "train.steps"),
        ("optim: {lr: .nan}", "optim.lr: "),
        ("optim: {lr: 1e999}", "optim.lr: "),
        ("train: {epochs: .inf}", "train.epochs"),
        ("optim: {betas: [1.5, 0]}", "optim.betas.0"),
        ("model: {image: {kind: small, widths: [0, 8, 8, 8]}}", "model.image.widths.0"),
        ("model: {proposals: {stages: [5]}}", "model.proposals.stages.0"),
        ("model: {image: {kind: [small]}}", "model.image: "),
        ("data: {image_size: 1000000}", "data.image_size: "),
        ("evaluate: {batch: 100000000000}", "evaluate.batch: "),
        ("name: ..", "name: "),
        ("name: .", "name: "),
        ("name: -x", "name: "),
        ("name: " + "é" * 120, "name: longer than 200 bytes"),
        ("name: 010", "name: .*found 10; put it in quotes"),
        ("run_dir: ''", "run_dir: an empty path"),
        ("data: {cache_dir: ''}", "data.cache_dir: an empty path"),
        ("data: {tokenizer: ''}", "data.tokenizer: "),
        ("tracking: {kind: mlflow, experiment: ''}", "tracking.experiment: "),
        ("name: a\n---\nname: b", "single document"),
        ("name: *x", "undefined alias"),
        ("0", "expected a mapping"),
        ("a: 1\n" * 2, "line 2: key 'a' is given twice"),
        ("a: 1\n'a': 1", "line 2: key 'a' is given twice"),
        ("#" * (1 << 20) + "\nname: x", "larger than"),
    ],
    ids=lambda value: value[:30],
)
def test_hostile_file_is_refused_in_short_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_config(write_yaml(tmp_path, text))

    assert "run.yaml" in str(caught.value)
    assert max(map(len, str(caught.value).split("\n"))) < 700


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["data.train=&a [*a]"], "levels"),
        (["data.train=" + "[" * 3000], "levels"),
        (["data.augment={[1]: 2}"], "as the key"),
        (["seed.x.y=1"], "seed: "),
        (["data.train=[1]", "data.train.0.index=x"], "data.train.0.split: field required"),
        (["data.train=[1]", "data.train.99999999999999999999.index=x"], "not an index"),
        (["data.train=[1]", "data.train.².index=x"], "not an index"),
        (["tracking.uri=x"], "tracking.kind is missing; set it to one of none, mlflow"),
        (["data..train=x"], "dotted.key=value"),
        (["optim.betas=[1.5, 0]"], "override 'optim.betas=.*optim.betas.0: "),
        (["tracking.experiment=a #1"], "begins a comment"),
        (["name=\udcff"], "not allowed"),
        (["model.kind={a: 1}"], "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_override_is_refused_in_short_lines(
    tmp_path: Path, wrong: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_config(write_yaml(tmp_path, "name: x"), wrong)

    assert max(map(len, str(caught.value).split("\n"))) < 700


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "utf16.yaml").write_text("name: x", encoding="utf-16")
    (tmp_path / "bom.yaml").write_text("name: x", encoding="utf-8-sig")

    for wrong in (tmp_path / "utf16.yaml", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{wrong}: "):
            read_config(wrong)
    assert read_config(tmp_path / "bom.yaml").name == "x"


words = st.text(st.characters(exclude_categories=["C"], exclude_characters="\x85"), max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | words
    | st.sampled_from(["010", "1e-3", "0o7", "no", "~", "1:30", "2026-01-01", "=", "<<", ".5", "-"])
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(tree=st.dictionaries(words, trees, max_size=5))
def test_what_is_written_is_read_by_our_rules_and_by_those_of_yaml_1_1(
    tree: dict[str, Any],
) -> None:
    text = to_yaml(tree)

    with tempfile.TemporaryDirectory() as folder:
        assert read_yaml(write_yaml(Path(folder), text)) == tree
    assert yaml.safe_load(text) == tree
