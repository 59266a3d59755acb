"""Pretrained text encoders, and the weights of whole models."""

from __future__ import annotations

import pytest
import timm
import torch

from coupalign.config.schema import (
    CoupAlignConfig,
    LavtConfig,
    VltConfig,
)
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.text import write_shape
from coupalign.model.weights import load as weights
from tests.unit.model.weights.encoders import (
    bert,
    headless,
    official,
    randomize,
    refused,
    same,
    snapshot,
    swin,
)


def test_hugging_face_folder(tmp_path):
    source, net = bert(seed=1, pooler=True), bert(seed=2)
    source.save_pretrained(tmp_path)
    report = weights.load_text_weights(net, str(tmp_path))
    words = torch.randint(50, (2, 7))
    assert torch.equal(net(words).last_hidden_state, source(words).last_hidden_state)
    assert set(report.loaded) == set(net.state_dict())
    assert report.left_out == (
        ("pooler.dense.bias", "the pooler"),
        ("pooler.dense.weight", "the pooler"),
    )


def test_old_bert_bin_with_heads_gamma_and_beta(tmp_path):
    source, net = bert(seed=1), bert(seed=2)
    state = {}
    for name, tensor in source.state_dict().items():
        head, _, last = name.rpartition(".")
        last = {"weight": "gamma", "bias": "beta"}[last] if head.endswith("LayerNorm") else last
        state[f"bert.{head}.{last}"] = tensor
    state |= {
        "cls.predictions.bias": torch.zeros(50),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(16),
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "bert.pooler.dense.weight": torch.zeros(16, 16),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = weights.load_text_weights(net, str(tmp_path))
    assert same(net.state_dict(), source.state_dict())
    assert len(report.left_out) == 4 and "gamma" in report.text() and "'bert.'" in report.text()


def test_another_vocabulary_names_both_sizes(tmp_path):
    bert(words=60).save_pretrained(tmp_path)
    message = refused(
        weights.load_text_weights,
        bert(words=50),
        str(tmp_path),
        match="60 words, the tokenizer's has 50",
    )
    assert "data.tokenizer" in message


def test_another_bert_is_refused(tmp_path):
    bert(layers=5).save_pretrained(tmp_path)
    refused(
        weights.load_text_weights,
        bert(layers=4),
        str(tmp_path),
        match="a BERT of 5 layers, width 16, 50 words",
    )
    torch.save(official(swin()), tmp_path / "swin.pth")
    refused(
        weights.load_text_weights, bert(), str(tmp_path / "swin.pth"), match="they look like a Swin"
    )
    bert().save_pretrained(tmp_path)
    refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path),
        match="they look like a BERT",
    )


# ------------------------------------------------------------------------------------------------------ the whole model


class TwoEncoders(torch.nn.Module):
    """What the loading reads of a CoupAlign: where its encoders lie."""

    def __init__(self):
        super().__init__()
        self.image, self.text = torch.nn.Module(), torch.nn.Module()
        self.image.net, self.text.bert = headless(swin()), bert()


def config(image, text):
    return CoupAlignConfig.model_validate({"image": image, "text": text})


def test_load_pretrained_loads_both_encoders(tmp_path):
    model, net, words = TwoEncoders(), swin(seed=7), bert(seed=8)
    torch.save({"model": official(net)}, tmp_path / "swin.pth")
    words.save_pretrained(tmp_path / "bert")
    reports = weights.load_pretrained(
        model,
        config(
            {"kind": "timm", "name": "swin_x", "weights": str(tmp_path / "swin.pth")},
            {"kind": "bert", "weights": str(tmp_path / "bert")},
        ),
    )
    assert [(report.part, report.random) for report in reports] == [
        ("image", False),
        ("text", False),
    ]
    assert torch.equal(model.image.net.patch_embed.proj.weight, net.patch_embed.proj.weight)
    assert same(model.text.bert.state_dict(), words.state_dict())


@pytest.mark.parametrize(
    "image,text",
    [
        (
            {"kind": "timm", "weights": None},
            {"kind": "bert", "weights": "random:bert-base-uncased"},
        ),
        ({"kind": "small"}, {"kind": "small"}),
    ],
)
def test_a_random_start_is_said_aloud(image, text):
    model = TwoEncoders()
    before = snapshot(model)
    reports = weights.load_pretrained(model, config(image, text))
    assert [report.part for report in reports] == ["image", "text"]
    assert all(
        report.random and "RANDOM START" in report.text() and report.to_json()["random"]
        for report in reports
    )
    assert same(before, model.state_dict())


def test_named_weights_never_become_a_random_start(tmp_path):
    with pytest.raises(InputError, match="model.text.weights"):
        weights.load_pretrained(
            TwoEncoders(),
            config({"kind": "small"}, {"kind": "bert", "weights": str(tmp_path / "nothing")}),
        )
    assert weights.random_shape_source("random:some/folder") == "some/folder"
    assert weights.random_shape_source("bert-base-uncased") is None


def test_own_weights_are_loaded_whole_or_not_at_all(tmp_path):
    source, model = randomize(TwoEncoders()), TwoEncoders()
    state = snapshot(source)
    weights.load_model_weights(model, state)
    assert same(model.state_dict(), state)
    first, last = list(state)[0], list(state)[-1]
    model = TwoEncoders()
    message = refused(
        weights.load_model_weights,
        model,
        {name: state[name] for name in state if name != last},
        "runs/x",
        match="runs/x: these are the weights of another model",
    )
    assert f"missing in the file:\n    {last} (" in message
    refused(
        weights.load_model_weights,
        model,
        state | {"sma.new": torch.zeros(2)},
        match=r"only in the file:\n    sma.new \(2,\)",
    )
    refused(
        weights.load_model_weights,
        model,
        state | {first: torch.zeros(2)},
        match=rf"{first} \(2,\) in the file, \(8, 3, 4, 4\) in the model",
    )


def test_a_real_model_takes_its_encoder_from_a_folder_and_itself_from_a_file(tmp_path):
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
    image, text = weights.load_pretrained(model, small)
    assert image.random and not text.random and not text.missing
    assert same(model.text.bert.state_dict(), source.state_dict())
    weights.write_weights(tmp_path / "model.safetensors", model.state_dict())
    weights.load_model_weights(other, weights.read_weights(tmp_path / "model.safetensors"))
    assert same(other.state_dict(), model.state_dict())
    deeper = build_model(
        small.model_copy(update={"proposals": small.proposals.model_copy(update={"layers": 2})}),
        50,
        64,
    )
    refused(
        weights.load_model_weights,
        deeper,
        model.state_dict(),
        match=r"missing in the file:\n    proposals\.",
    )


def test_a_run_starts_from_the_encoders_of_another_run(tmp_path):
    """model.image.weights is its checkpoint's weights.safetensors, model.text.weights the folder text/ beside that: of any method."""
    bert().save_pretrained(tmp_path / "bert")
    encoders = {
        "image": {"kind": "timm", "name": "resnet18"},
        "text": {"kind": "bert", "weights": str(tmp_path / "bert")},
    }
    run = build_model(LavtConfig.model_validate({**encoders, "decoder": {"width": 8}}), 50, 64)
    randomize(run)
    weights.write_weights(tmp_path / "weights.safetensors", run.state_dict())
    write_shape(run.config.text, 50, tmp_path / "text")
    net, words = timm.create_model("resnet18", num_classes=0, global_pool=""), bert(seed=9)
    image = weights.load_image_weights(net, "resnet18", str(tmp_path / "weights.safetensors"))
    text = weights.load_text_weights(words, str(tmp_path / "weights.safetensors"))
    assert same(net.state_dict(), run.image.net.state_dict()) and same(
        words.state_dict(), run.text.bert.state_dict()
    )
    assert (
        "prefix 'image.net.'" in image.text()
        and "prefix 'text.bert.'" in text.text()
        and not image.leak
        and not text.leak
    )
    refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "weights.safetensors"),
        match="they look like a run of ours with resnet18",
    )
    started = VltConfig.model_validate(
        {
            "image": {**encoders["image"], "weights": str(tmp_path / "weights.safetensors")},
            "text": {"kind": "bert", "weights": str(tmp_path / "text")},
        }
    )
    other = build_model(started, 50, 64)
    assert not any(report.random for report in weights.load_pretrained(other, started))
    assert same(other.image.net.state_dict(), run.image.net.state_dict()) and same(
        other.text.bert.state_dict(), run.text.bert.state_dict()
    )
