"""Pretrained text encoders, and the weights of whole models."""

from __future__ import annotations

import pytest
import timm
import torch

from coupalign.config.schema import CoupAlignConfig, LavtConfig, VltConfig
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.text import write_bert_config
from coupalign.model.weights.files import read_weights, write_weights
from coupalign.model.weights.load import (
    load_image_weights,
    load_model_weights,
    load_pretrained,
    load_text_weights,
    random_shape_source,
)
from tests.unit.model.weights.encoders import (
    assert_refused,
    bert,
    headless,
    official,
    randomize,
    same,
    snapshot,
    swin,
)

# ----------------------------------------------------------------------------------- text encoders


def test_hugging_face_folder_gives_the_same_features(tmp_path):
    source, net = bert(seed=1, pooler=True), bert(seed=2)
    source.save_pretrained(tmp_path)

    report = load_text_weights(net, str(tmp_path))

    words = torch.randint(50, (2, 7))
    assert torch.equal(net(words).last_hidden_state, source(words).last_hidden_state)
    assert set(report.loaded) == set(net.state_dict())
    assert report.left_out == (
        ("pooler.dense.bias", "the pooler"),
        ("pooler.dense.weight", "the pooler"),
    )


def test_old_bert_file_with_heads_gamma_and_beta(tmp_path):
    source, net = bert(seed=1), bert(seed=2)
    old_names = {"weight": "gamma", "bias": "beta"}
    state = {
        "cls.predictions.bias": torch.zeros(50),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(16),
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "bert.pooler.dense.weight": torch.zeros(16, 16),
    }
    for name, tensor in source.state_dict().items():
        module, _, last = name.rpartition(".")
        if module.endswith("LayerNorm"):
            last = old_names[last]
        state[f"bert.{module}.{last}"] = tensor
    torch.save(state, tmp_path / "pytorch_model.bin")

    report = load_text_weights(net, str(tmp_path))

    assert same(net.state_dict(), source.state_dict())
    assert len(report.left_out) == 4
    assert "gamma" in report.text() and "'bert.'" in report.text()


def test_another_vocabulary_names_both_sizes(tmp_path):
    bert(words=60).save_pretrained(tmp_path)

    message = assert_refused(
        load_text_weights,
        bert(words=50),
        str(tmp_path),
        match="60 words, the tokenizer's has 50",
    )

    assert "data.tokenizer" in message


def test_another_bert_is_refused(tmp_path):
    bert(layers=5).save_pretrained(tmp_path)

    assert_refused(
        load_text_weights,
        bert(layers=4),
        str(tmp_path),
        match="a BERT of 5 layers, width 16, 50 words",
    )


def test_encoder_of_the_other_kind_is_refused(tmp_path):
    torch.save(official(swin()), tmp_path / "swin.pth")
    assert_refused(
        load_text_weights, bert(), str(tmp_path / "swin.pth"), match="they look like a Swin"
    )

    bert().save_pretrained(tmp_path / "bert")
    assert_refused(
        load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "bert"),
        match="they look like a BERT",
    )


# ----------------------------------------------------------------------------------- both encoders


class TwoEncoders(torch.nn.Module):
    """The part of a CoupAlign that loading reads: its encoders, by their names."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Module(), torch.nn.Module()
        self.image.net, self.text.bert = headless(swin()), bert()


def config(image, text):
    return CoupAlignConfig.model_validate({"image": image, "text": text})


def test_load_pretrained_loads_both_encoders(tmp_path):
    model, image_source, text_source = TwoEncoders(), swin(seed=7), bert(seed=8)
    torch.save({"model": official(image_source)}, tmp_path / "swin.pth")
    text_source.save_pretrained(tmp_path / "bert")
    image = {"kind": "timm", "name": "swin_x", "weights": str(tmp_path / "swin.pth")}
    text = {"kind": "bert", "weights": str(tmp_path / "bert")}

    reports = load_pretrained(model, config(image, text))

    starts = [(report.part, report.random) for report in reports]
    assert starts == [("image", False), ("text", False)]
    patches = image_source.patch_embed.proj.weight
    assert torch.equal(model.image.net.patch_embed.proj.weight, patches)
    assert same(model.text.bert.state_dict(), text_source.state_dict())


@pytest.mark.parametrize(
    "image, text",
    [
        (
            {"kind": "timm", "weights": None},
            {"kind": "bert", "weights": "random:bert-base-uncased"},
        ),
        ({"kind": "small"}, {"kind": "small"}),
    ],
)
def test_random_start_is_reported_in_capitals(image, text):
    model = TwoEncoders()
    before = snapshot(model)

    reports = load_pretrained(model, config(image, text))

    assert [report.part for report in reports] == ["image", "text"]
    for report in reports:
        assert report.random and report.to_json()["random"]
        assert "RANDOM START" in report.text()
    assert same(before, model.state_dict())


def test_named_weights_never_become_a_random_start(tmp_path):
    text = {"kind": "bert", "weights": str(tmp_path / "nothing")}

    with pytest.raises(InputError, match="model.text.weights"):
        load_pretrained(TwoEncoders(), config({"kind": "small"}, text))


def test_random_shape_source_is_what_follows_the_prefix():
    assert random_shape_source("random:some/folder") == "some/folder"
    assert random_shape_source("bert-base-uncased") is None


# ------------------------------------------------------------------------------------ whole models


def test_own_weights_are_loaded_whole_or_not_at_all():
    source, model = randomize(TwoEncoders()), TwoEncoders()
    state = snapshot(source)
    first, *_, last = state

    load_model_weights(model, state)
    assert same(model.state_dict(), state)

    # One tensor is missing.
    model = TwoEncoders()
    shorter = {name: tensor for name, tensor in state.items() if name != last}
    message = assert_refused(
        load_model_weights,
        model,
        shorter,
        "runs/x",
        match="runs/x: these weights belong to another model",
    )
    assert f"missing in the file:\n    {last} (" in message

    # One is too many, or has another shape.
    assert_refused(
        load_model_weights,
        model,
        state | {"sma.new": torch.zeros(2)},
        match=r"only in the file:\n    sma.new \(2,\)",
    )
    assert_refused(
        load_model_weights,
        model,
        state | {first: torch.zeros(2)},
        match=rf"{first} \(2,\) in the file, \(8, 3, 4, 4\) in the model",
    )


def test_real_model_takes_its_encoder_from_a_folder_and_itself_from_a_file(tmp_path):
    source = bert(seed=3)
    source.save_pretrained(tmp_path / "bert")
    small = CoupAlignConfig.model_validate(
        {
            "image": {"kind": "small", "widths": (8, 8, 16, 16)},
            "text": {"kind": "bert", "weights": str(tmp_path / "bert")},
            "decoder": {"width": 16},
            "proposals": {"count": 2, "layers": 1, "heads": 2, "ffn": 16},
        }
    )
    model, other = (build_model(small, vocabulary=50, image_size=64) for _ in range(2))

    # The encoder from a folder.
    image, text = load_pretrained(model, small)
    assert image.random and not text.random and not text.missing
    assert same(model.text.bert.state_dict(), source.state_dict())

    # The whole model from its own file.
    path = tmp_path / "model.safetensors"
    write_weights(path, model.state_dict())
    load_model_weights(other, read_weights(path))
    assert same(other.state_dict(), model.state_dict())

    # A model of another depth refuses it.
    two_layers = small.proposals.model_copy(update={"layers": 2})
    deeper = build_model(small.model_copy(update={"proposals": two_layers}), 50, 64)
    assert_refused(
        load_model_weights,
        deeper,
        model.state_dict(),
        match=r"missing in the file:\n    proposals\.",
    )


@pytest.fixture
def finished_run(tmp_path):
    """A trained LAVT with a ResNet-18 and a BERT, and its checkpoint in `tmp_path`."""
    bert().save_pretrained(tmp_path / "bert")
    run_config = LavtConfig.model_validate(
        {
            "image": {"kind": "timm", "name": "resnet18"},
            "text": {"kind": "bert", "weights": str(tmp_path / "bert")},
            "decoder": {"width": 8},
        }
    )
    run = randomize(build_model(run_config, 50, 64))
    write_weights(tmp_path / "weights.safetensors", run.state_dict())
    write_bert_config(run_config.text, 50, tmp_path / "text")
    return run


def test_encoders_of_another_run_are_loaded_from_its_weights(tmp_path, finished_run):
    path = str(tmp_path / "weights.safetensors")
    net = timm.create_model("resnet18", num_classes=0, global_pool="")
    text_net = bert(seed=9)

    image = load_image_weights(net, "resnet18", path)
    text = load_text_weights(text_net, path)

    assert same(net.state_dict(), finished_run.image.net.state_dict())
    assert same(text_net.state_dict(), finished_run.text.bert.state_dict())
    assert "prefix 'image.net.'" in image.text() and not image.leak
    assert "prefix 'text.bert.'" in text.text() and not text.leak
    assert_refused(
        load_image_weights,
        headless(swin()),
        "swin_x",
        path,
        match="they look like a run of ours with resnet18",
    )


def test_run_of_another_method_starts_from_the_encoders_of_a_run(tmp_path, finished_run):
    """The config names the weights for the image, and the folder text/ next to them for text."""
    weights = str(tmp_path / "weights.safetensors")
    started = VltConfig.model_validate(
        {
            "image": {"kind": "timm", "name": "resnet18", "weights": weights},
            "text": {"kind": "bert", "weights": str(tmp_path / "text")},
        }
    )
    model = build_model(started, 50, 64)

    reports = load_pretrained(model, started)

    assert not any(report.random for report in reports)
    assert same(model.image.net.state_dict(), finished_run.image.net.state_dict())
    assert same(model.text.bert.state_dict(), finished_run.text.bert.state_dict())
