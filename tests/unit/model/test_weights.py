"""Pretrained weights: every kind of file loads exactly, every wrong file is refused and changes nothing."""
from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from coupalign.compat import prepare_torchvision

prepare_torchvision()

import huggingface_hub  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402

from coupalign.config.schema import CoupAlignConfig, LavtConfig, VltConfig  # noqa: E402
from coupalign.errors import InputError  # noqa: E402
from coupalign.model import weights  # noqa: E402
from coupalign.model.methods import build_model  # noqa: E402
from coupalign.model.text import write_shape  # noqa: E402
from coupalign.model.weights_names import looks_like  # noqa: E402
from tests.unit.model.test_weights_names import bicubic_1d  # noqa: E402


def swin(window=4, pixels=128, width=8, depths=(1, 1, 2, 1), classes=5, seed=0, heads=(1, 2, 4, 8)):
    torch.manual_seed(seed)
    net = SwinTransformer(img_size=pixels, window_size=window, embed_dim=width, depths=depths, num_heads=heads,
                          num_classes=classes, drop_path_rate=0.0)
    return randomize(net).eval()


def randomize(net):
    """Every number its own value, so that a swap or an omission shows (norms start as ones and zeros)."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.3) if tensor.ndim == 1 else tensor.normal_(0, 0.1)
    return net


def official(net):
    """The state of a timm Swin under the names of the official repository, with its derived buffers."""
    state = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        if parts[0] == "head":
            parts.remove("fc")
        state[".".join(parts)] = tensor.clone()
    for name, module in net.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"{name}.relative_position_index"] = module.relative_position_index
    state["layers.0.blocks.0.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def snapshot(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def headless(net):
    """As an encoder uses it: no classifier, no final norm."""
    net.head = net.norm = torch.nn.Identity()
    return net


def refused(load, net, *arguments, match):
    """The load fails with this message and leaves every tensor as it was."""
    before = snapshot(net)
    with pytest.raises(InputError, match=match) as caught:
        load(net, *arguments)
    assert same(before, net.state_dict()), "a refused file changed the model"
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- image encoders


def test_official_swin_gives_the_same_features(tmp_path):
    source, net = swin(seed=1), headless(swin(seed=2))
    torch.save({"model": official(source), "epoch": 3}, tmp_path / "swin.pth")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pth"))
    image = torch.randn(2, 3, 128, 128)
    assert torch.equal(net.forward_features(image), headless(source).forward_features(image))
    assert set(report.loaded) == set(net.state_dict()) and not report.interpolated and not report.missing
    assert {why for _, why in report.left_out} == {"derived", "the classifier", "the norm after the last stage"}
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= {name for name, _ in report.left_out}
    assert "official Swin names" in report.text() and "head.weight" in report.text()
    assert json.loads(json.dumps(report.to_json()))["random"] is False


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "encoder.", "module.backbone."])
def test_prefixes_are_taken_off_and_told(tmp_path, prefix):
    source, net = swin(seed=1), headless(swin(seed=2))
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if prefix:
        state["decode_head.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "swin.pt")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pt"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert (repr(prefix) in report.text()) == bool(prefix)
    assert (("decode_head.weight", f"not below {prefix!r}") in report.left_out) == bool(prefix)


def test_a_kept_final_norm_is_loaded_and_a_kept_classifier_may_stay(tmp_path):
    source, net = swin(seed=1), swin(seed=2, classes=3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "swin.safetensors")
    head = net.head.fc.weight.clone()
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.safetensors"))
    assert torch.equal(net.norm.weight, source.norm.weight) and "norm.weight" in report.loaded
    assert torch.equal(net.head.fc.weight, head)
    assert report.missing == ("head.fc.weight", "head.fc.bias") and ("head.fc.bias", "the classifier") in report.left_out


def bicubic(table, entries):
    """The official rule from its definition, an axis at a time."""
    old, new = round(len(table) ** 0.5), round(entries ** 0.5)
    rows = torch.from_numpy(bicubic_1d(old, new))
    return torch.einsum("yi,xj,ijh->yxh", rows, rows, table.double().view(old, old, -1)).reshape(entries, -1).float()


def shift_mask(side, window, shift):
    """Which pairs of a shifted window must not meet: those that the roll brought together. [windows, w*w, w*w], by hand."""
    region = torch.tensor([0 if i < side - window else 1 if i < side - shift else 2 for i in range(side)])
    of = 3 * region[:, None] + region
    windows = [of[y:y + window, x:x + window].flatten() for y in range(0, side, window) for x in range(0, side, window)]
    return torch.stack([(w[:, None] != w) * -100.0 for w in windows])


@pytest.mark.parametrize("window, pixels, new_window, new_pixels, resized", [
    (7, 224, 12, 384, 5), (12, 384, 7, 224, 5), (7, 224, 7, 448, 0), (12, 384, 12, 192, 1)])    # the last: 6 x 6 are left for 12
def test_another_window_or_resolution_interpolates_the_tables_and_nothing_else(tmp_path, window, pixels, new_window, new_pixels, resized):
    source, net = swin(window, pixels, seed=1), headless(swin(new_window, new_pixels, seed=2))
    torch.save({"model": official(source)}, tmp_path / "swin.pth")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pth"))
    tables = {name for name, _, _ in report.interpolated}
    assert len(tables) == resized and all(name.endswith("relative_position_bias_table") for name in tables)
    assert set(report.loaded) == set(net.state_dict()) - tables
    for name, tensor in net.state_dict().items():
        expected = source.state_dict()[name]
        if name in tables:     # fp32 places the samples to about 2e-6 of a step
            torch.testing.assert_close(tensor, bicubic(expected, len(tensor)), rtol=1e-5, atol=1e-5)
            expected = resize_rel_pos_bias_table_simple(expected, (round((len(tensor) ** 0.5 + 1) / 2),) * 2, tensor.shape)
        assert torch.equal(tensor, expected), name
    if resized == 5:
        assert "and 3 more" in report.text()
    shifted, side = net.layers[2].blocks[1], new_pixels // 16
    if side > new_window:      # else one window holds the whole stage, and nothing is shifted
        assert torch.equal(shifted.attn_mask, shift_mask(side, new_window, new_window // 2)), "not of this resolution"
    places = torch.cartesian_prod(torch.arange(new_window), torch.arange(new_window))
    offset = places[:, None] - places + new_window - 1
    assert torch.equal(shifted.attn.relative_position_index, offset[..., 0] * (2 * new_window - 1) + offset[..., 1])


@pytest.fixture(scope="module")
def resnet():
    return randomize(torchvision.models.resnet101()).eval()


def test_torchvision_resnet101_gives_the_same_features(tmp_path, resnet):
    with torch.no_grad():  # plain start keeps the activations of 101 layers in range
        for module in resnet.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(0.5)
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet101-5d3b4d8f.pth")
    net = timm.create_model("resnet101", num_classes=0).eval()
    report = weights.load_image_weights(net, "resnet101", str(tmp_path / "resnet101-5d3b4d8f.pth"))
    image = torch.randn(1, 3, 64, 64)
    resnet.fc = torch.nn.Identity()
    with torch.no_grad():
        expected, features = resnet(image), net(image)
    assert expected.std() > 0 and torch.allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in report.left_out} == {"fc.weight", "fc.bias"}
    assert report.missing and all(name.endswith("num_batches_tracked") for name in report.missing)
    safetensors.torch.save_file(net.state_dict() | {"fc.weight": torch.zeros(2, 2048)}, tmp_path / "timm.safetensors")
    again = weights.load_image_weights(randomize(net), "resnet101", str(tmp_path / "timm.safetensors"))
    assert set(again.loaded) == set(net.state_dict()) and again.left_out == (("fc.weight", "the classifier"),)
    assert torch.equal(net.layer4[2].bn3.running_var, resnet.layer4[2].bn3.running_var)
    message = refused(weights.load_image_weights, net, "resnet101", wrong_depth(state, tmp_path), match="look like resnet50")
    assert "missing in the file:\n    layer3.6.conv1.weight (256, 1024, 1, 1)" in message


def wrong_depth(state, folder):
    short = {name: tensor for name, tensor in state.items()
             if not (name.startswith("layer3.") and int(name.split(".")[1]) >= 6)}
    torch.save(short, folder / "resnet50.pth")
    return str(folder / "resnet50.pth")


def test_darknet53_by_timms_own_names(tmp_path):
    source = timm.create_model("darknet53")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "darknet.safetensors")
    net = timm.create_model("darknet53", num_classes=0)
    report = weights.load_image_weights(net, "darknet53", str(tmp_path / "darknet.safetensors"))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert len(report.loaded) == len(net.state_dict()) and looks_like(source.state_dict()) == "darknet53"
    refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "darknet.safetensors"),
            match="look like darknet53")


# -------------------------------------------------------------------------------------------- files of another model


def test_another_width_names_tensors_with_both_shapes(tmp_path):
    torch.save({"model": official(swin(width=16, seed=1, heads=(1, 2, 4, 8)))}, tmp_path / "wide.pth")
    message = refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "wide.pth"),
                      match="not the weights of swin_x; they look like a Swin of width 16, depths \\(1, 1, 2, 1\\), window 4")
    assert "patch_embed.proj.weight (16, 3, 4, 4) in the file, (8, 3, 4, 4) in the model" in message
    assert "wide.pth" in message and "model.image.weights" in message


def test_a_deeper_sibling_is_refused_though_every_needed_tensor_is_there(tmp_path):
    torch.save({"model": official(swin(depths=(1, 1, 4, 1), seed=1))}, tmp_path / "deep.pth")
    message = refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "deep.pth"),
                      match="only in the file")
    assert "layers.2.blocks.2.norm1.weight (32,)" in message and "more" in message


def test_one_missing_tensor_is_refused(tmp_path):
    state = official(swin(seed=1))
    del state["layers.2.blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "swin.pth")
    refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "swin.pth"),
            match=r"missing in the file:\n    layers.2.blocks.1.attn.qkv.bias \(96,\)")


def test_tables_of_other_heads_are_not_interpolated(tmp_path):
    torch.save(official(swin(window=7, pixels=224, heads=(2, 2, 4, 8), seed=1)), tmp_path / "swin.pth")
    refused(weights.load_image_weights, headless(swin(window=12, pixels=384)), "swin_x", str(tmp_path / "swin.pth"),
            match=r"relative_position_bias_table \(169, 2\) in the file, \(529, 1\) in the model")


def test_damaged_numbers_are_refused(tmp_path):
    state = official(swin(seed=1))
    state["layers.3.blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "swin.pth")
    refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "swin.pth"),
            match="layers.3.blocks.0.mlp.fc1.weight holds NaN")


def test_hub_means_timms_own_weights(tmp_path, monkeypatch):
    with torch.device("meta"):
        published = timm.create_model("swin_base_patch4_window12_384.ms_in22k").pretrained_cfg
    source, net = swin(seed=1), headless(swin(seed=2))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **_: asked.append(names) or tmp_path / names[1])
    refused(weights.load_image_weights, net, "swin_x", "hub", match="timm publishes no weights for swin_x")
    net.pretrained_cfg = published
    weights.load_image_weights(net, "swin_x", "hub")
    assert asked == [("timm/swin_base_patch4_window12_384.ms_in22k", "model.safetensors")]
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ BERT


def bert(words=50, layers=4, seed=0, pooler=False):
    torch.manual_seed(seed)
    shape = transformers.BertConfig(vocab_size=words, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
                                    intermediate_size=32, max_position_embeddings=24)
    return randomize(transformers.BertModel(shape, add_pooling_layer=pooler)).eval()


def test_hugging_face_folder(tmp_path):
    source, net = bert(seed=1, pooler=True), bert(seed=2)
    source.save_pretrained(tmp_path)
    report = weights.load_text_weights(net, str(tmp_path))
    words = torch.randint(50, (2, 7))
    assert torch.equal(net(words).last_hidden_state, source(words).last_hidden_state)
    assert set(report.loaded) == set(net.state_dict())
    assert report.left_out == (("pooler.dense.bias", "the pooler"), ("pooler.dense.weight", "the pooler"))


def test_old_bert_bin_with_heads_gamma_and_beta(tmp_path):
    source, net = bert(seed=1), bert(seed=2)
    state = {}
    for name, tensor in source.state_dict().items():
        head, _, last = name.rpartition(".")
        last = {"weight": "gamma", "bias": "beta"}[last] if head.endswith("LayerNorm") else last
        state[f"bert.{head}.{last}"] = tensor
    state |= {"cls.predictions.bias": torch.zeros(50), "cls.predictions.transform.LayerNorm.gamma": torch.ones(16),
              "bert.embeddings.position_ids": torch.arange(24)[None], "bert.pooler.dense.weight": torch.zeros(16, 16)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = weights.load_text_weights(net, str(tmp_path))
    assert same(net.state_dict(), source.state_dict())
    assert len(report.left_out) == 4 and "gamma" in report.text() and "'bert.'" in report.text()


def test_another_vocabulary_names_both_sizes(tmp_path):
    bert(words=60).save_pretrained(tmp_path)
    message = refused(weights.load_text_weights, bert(words=50), str(tmp_path), match="60 words, the tokenizer's has 50")
    assert "data.tokenizer" in message


def test_another_bert_is_refused(tmp_path):
    bert(layers=5).save_pretrained(tmp_path)
    refused(weights.load_text_weights, bert(layers=4), str(tmp_path), match="a BERT of 5 layers, width 16, 50 words")
    torch.save(official(swin()), tmp_path / "swin.pth")
    refused(weights.load_text_weights, bert(), str(tmp_path / "swin.pth"), match="they look like a Swin")
    bert().save_pretrained(tmp_path)
    refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path), match="they look like a BERT")


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
    reports = weights.load_pretrained(model, config({"kind": "timm", "name": "swin_x", "weights": str(tmp_path / "swin.pth")},
                                                    {"kind": "bert", "weights": str(tmp_path / "bert")}))
    assert [(report.part, report.random) for report in reports] == [("image", False), ("text", False)]
    assert torch.equal(model.image.net.patch_embed.proj.weight, net.patch_embed.proj.weight)
    assert same(model.text.bert.state_dict(), words.state_dict())


@pytest.mark.parametrize("image,text", [
    ({"kind": "timm", "weights": None}, {"kind": "bert", "weights": "random:bert-base-uncased"}),
    ({"kind": "small"}, {"kind": "small"}),
])
def test_a_random_start_is_said_aloud(image, text):
    model = TwoEncoders()
    before = snapshot(model)
    reports = weights.load_pretrained(model, config(image, text))
    assert [report.part for report in reports] == ["image", "text"]
    assert all(report.random and "RANDOM START" in report.text() and report.to_json()["random"] for report in reports)
    assert same(before, model.state_dict())


def test_named_weights_never_become_a_random_start(tmp_path):
    with pytest.raises(InputError, match="model.text.weights"):
        weights.load_pretrained(TwoEncoders(), config({"kind": "small"}, {"kind": "bert", "weights": str(tmp_path / "nothing")}))
    assert weights.random_shape_source("random:some/folder") == "some/folder"
    assert weights.random_shape_source("bert-base-uncased") is None


def test_own_weights_are_loaded_whole_or_not_at_all(tmp_path):
    source, model = randomize(TwoEncoders()), TwoEncoders()
    state = snapshot(source)
    weights.load_model_weights(model, state)
    assert same(model.state_dict(), state)
    first, last = list(state)[0], list(state)[-1]
    model = TwoEncoders()
    message = refused(weights.load_model_weights, model, {name: state[name] for name in state if name != last}, "runs/x",
                      match="runs/x: these are the weights of another model")
    assert f"missing in the file:\n    {last} (" in message
    refused(weights.load_model_weights, model, state | {"sma.new": torch.zeros(2)},
            match=r"only in the file:\n    sma.new \(2,\)")
    refused(weights.load_model_weights, model, state | {first: torch.zeros(2)},
            match=rf"{first} \(2,\) in the file, \(8, 3, 4, 4\) in the model")


def test_a_real_model_takes_its_encoder_from_a_folder_and_itself_from_a_file(tmp_path):
    source = bert(seed=3)
    source.save_pretrained(tmp_path / "bert")
    small = CoupAlignConfig.model_validate({
        "image": {"kind": "small", "widths": (8, 8, 16, 16)}, "text": {"kind": "bert", "weights": str(tmp_path / "bert")},
        "decoder": {"width": 16}, "proposals": {"count": 2, "layers": 1, "heads": 2, "ffn": 16}})
    model, other = (build_model(small, vocabulary=50, image_size=64) for _ in range(2))
    image, text = weights.load_pretrained(model, small)
    assert image.random and not text.random and not text.missing
    assert same(model.text.bert.state_dict(), source.state_dict())
    weights.write_weights(tmp_path / "model.safetensors", model.state_dict())
    weights.load_model_weights(other, weights.read_weights(tmp_path / "model.safetensors"))
    assert same(other.state_dict(), model.state_dict())
    deeper = build_model(small.model_copy(update={"proposals": small.proposals.model_copy(update={"layers": 2})}), 50, 64)
    refused(weights.load_model_weights, deeper, model.state_dict(), match=r"missing in the file:\n    proposals\.")


def test_a_run_starts_from_the_encoders_of_another_run(tmp_path):
    """model.image.weights is its checkpoint's weights.safetensors, model.text.weights the folder text/ beside that: of any method."""
    bert().save_pretrained(tmp_path / "bert")
    encoders = {"image": {"kind": "timm", "name": "resnet18"}, "text": {"kind": "bert", "weights": str(tmp_path / "bert")}}
    run = build_model(LavtConfig.model_validate({**encoders, "decoder": {"width": 8}}), 50, 64)
    randomize(run)
    weights.write_weights(tmp_path / "weights.safetensors", run.state_dict())
    write_shape(run.config.text, 50, tmp_path / "text")
    net, words = timm.create_model("resnet18", num_classes=0, global_pool=""), bert(seed=9)
    image = weights.load_image_weights(net, "resnet18", str(tmp_path / "weights.safetensors"))
    text = weights.load_text_weights(words, str(tmp_path / "weights.safetensors"))
    assert same(net.state_dict(), run.image.net.state_dict()) and same(words.state_dict(), run.text.bert.state_dict())
    assert "prefix 'image.net.'" in image.text() and "prefix 'text.bert.'" in text.text() and not image.leak and not text.leak
    refused(weights.load_image_weights, headless(swin()), "swin_x", str(tmp_path / "weights.safetensors"),
            match="they look like a run of ours with resnet18")
    started = VltConfig.model_validate({"image": {**encoders["image"], "weights": str(tmp_path / "weights.safetensors")},
                                        "text": {"kind": "bert", "weights": str(tmp_path / "text")}})
    other = build_model(started, 50, 64)
    assert not any(report.random for report in weights.load_pretrained(other, started))
    assert same(other.image.net.state_dict(), run.image.net.state_dict()) and same(other.text.bert.state_dict(), run.text.bert.state_dict())
