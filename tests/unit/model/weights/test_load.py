"""Pretrained image encoders: every kind of file loads exactly, every wrong file is refused and changes nothing."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

from coupalign.model.weights import load as weights
from coupalign.model.weights.names import looks_like
from tests.unit.model.weights.encoders import headless, official, randomize, refused, swin
from tests.unit.model.weights.test_names import bicubic_1d


def test_official_swin_gives_the_same_features(tmp_path):
    source, net = swin(seed=1), headless(swin(seed=2))
    torch.save({"model": official(source), "epoch": 3}, tmp_path / "swin.pth")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pth"))
    image = torch.randn(2, 3, 128, 128)
    assert torch.equal(net.forward_features(image), headless(source).forward_features(image))
    assert (
        set(report.loaded) == set(net.state_dict())
        and not report.interpolated
        and not report.missing
    )
    assert {why for _, why in report.left_out} == {
        "derived",
        "the classifier",
        "the norm after the last stage",
    }
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= {
        name for name, _ in report.left_out
    }
    assert "official Swin names" in report.text() and "head.weight" in report.text()
    assert json.loads(json.dumps(report.to_json()))["random"] is False


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "model.", "encoder.", "module.backbone."]
)
def test_prefixes_are_taken_off_and_told(tmp_path, prefix):
    source, net = swin(seed=1), headless(swin(seed=2))
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if prefix:
        state["decode_head.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "swin.pt")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pt"))
    assert all(
        torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items()
    )
    assert (repr(prefix) in report.text()) == bool(prefix)
    assert (("decode_head.weight", f"not below {prefix!r}") in report.left_out) == bool(prefix)


def test_a_kept_final_norm_is_loaded_and_a_kept_classifier_may_stay(tmp_path):
    source, net = swin(seed=1), swin(seed=2, classes=3)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "swin.safetensors")
    head = net.head.fc.weight.clone()
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.safetensors"))
    assert torch.equal(net.norm.weight, source.norm.weight) and "norm.weight" in report.loaded
    assert torch.equal(net.head.fc.weight, head)
    assert (
        report.missing == ("head.fc.weight", "head.fc.bias")
        and ("head.fc.bias", "the classifier") in report.left_out
    )


def bicubic(table, entries):
    """The official rule from its definition, an axis at a time."""
    old, new = round(len(table) ** 0.5), round(entries**0.5)
    rows = torch.from_numpy(bicubic_1d(old, new))
    return (
        torch.einsum("yi,xj,ijh->yxh", rows, rows, table.double().view(old, old, -1))
        .reshape(entries, -1)
        .float()
    )


def shift_mask(side, window, shift):
    """Which pairs of a shifted window must not meet: those that the roll brought together. [windows, w*w, w*w], by hand."""
    region = torch.tensor(
        [0 if i < side - window else 1 if i < side - shift else 2 for i in range(side)]
    )
    of = 3 * region[:, None] + region
    windows = [
        of[y : y + window, x : x + window].flatten()
        for y in range(0, side, window)
        for x in range(0, side, window)
    ]
    return torch.stack([(w[:, None] != w) * -100.0 for w in windows])


@pytest.mark.parametrize(
    "window, pixels, new_window, new_pixels, resized",
    [(7, 224, 12, 384, 5), (12, 384, 7, 224, 5), (7, 224, 7, 448, 0), (12, 384, 12, 192, 1)],
)  # the last: 6 x 6 are left for 12
def test_another_window_or_resolution_interpolates_the_tables_and_nothing_else(
    tmp_path, window, pixels, new_window, new_pixels, resized
):
    source, net = swin(window, pixels, seed=1), headless(swin(new_window, new_pixels, seed=2))
    torch.save({"model": official(source)}, tmp_path / "swin.pth")
    report = weights.load_image_weights(net, "swin_x", str(tmp_path / "swin.pth"))
    tables = {name for name, _, _ in report.interpolated}
    assert len(tables) == resized and all(
        name.endswith("relative_position_bias_table") for name in tables
    )
    assert set(report.loaded) == set(net.state_dict()) - tables
    for name, tensor in net.state_dict().items():
        expected = source.state_dict()[name]
        if name in tables:  # fp32 places the samples to about 2e-6 of a step
            torch.testing.assert_close(tensor, bicubic(expected, len(tensor)), rtol=1e-5, atol=1e-5)
            expected = resize_rel_pos_bias_table_simple(
                expected, (round((len(tensor) ** 0.5 + 1) / 2),) * 2, tensor.shape
            )
        assert torch.equal(tensor, expected), name
    if resized == 5:
        assert "and 3 more" in report.text()
    shifted, side = net.layers[2].blocks[1], new_pixels // 16
    if side > new_window:  # else one window holds the whole stage, and nothing is shifted
        assert torch.equal(shifted.attn_mask, shift_mask(side, new_window, new_window // 2)), (
            "not of this resolution"
        )
    places = torch.cartesian_prod(torch.arange(new_window), torch.arange(new_window))
    offset = places[:, None] - places + new_window - 1
    assert torch.equal(
        shifted.attn.relative_position_index, offset[..., 0] * (2 * new_window - 1) + offset[..., 1]
    )


@pytest.fixture(scope="module")
def resnet():
    return randomize(torchvision.models.resnet101()).eval()


def test_torchvision_resnet101_gives_the_same_features(tmp_path, resnet):
    with torch.no_grad():  # plain start keeps the activations of 101 layers in range
        for module in resnet.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(0.5)
    state = {
        name: tensor
        for name, tensor in resnet.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
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
    safetensors.torch.save_file(
        net.state_dict() | {"fc.weight": torch.zeros(2, 2048)}, tmp_path / "timm.safetensors"
    )
    again = weights.load_image_weights(
        randomize(net), "resnet101", str(tmp_path / "timm.safetensors")
    )
    assert set(again.loaded) == set(net.state_dict()) and again.left_out == (
        ("fc.weight", "the classifier"),
    )
    assert torch.equal(net.layer4[2].bn3.running_var, resnet.layer4[2].bn3.running_var)
    message = refused(
        weights.load_image_weights,
        net,
        "resnet101",
        wrong_depth(state, tmp_path),
        match="look like resnet50",
    )
    assert "missing in the file:\n    layer3.6.conv1.weight (256, 1024, 1, 1)" in message


def wrong_depth(state, folder):
    short = {
        name: tensor
        for name, tensor in state.items()
        if not (name.startswith("layer3.") and int(name.split(".")[1]) >= 6)
    }
    torch.save(short, folder / "resnet50.pth")
    return str(folder / "resnet50.pth")


def test_darknet53_by_timms_own_names(tmp_path):
    source = timm.create_model("darknet53")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "darknet.safetensors")
    net = timm.create_model("darknet53", num_classes=0)
    report = weights.load_image_weights(net, "darknet53", str(tmp_path / "darknet.safetensors"))
    assert all(
        torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items()
    )
    assert (
        len(report.loaded) == len(net.state_dict())
        and looks_like(source.state_dict()) == "darknet53"
    )
    refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "darknet.safetensors"),
        match="look like darknet53",
    )


# -------------------------------------------------------------------------------------------- files of another model


def test_another_width_names_tensors_with_both_shapes(tmp_path):
    torch.save(
        {"model": official(swin(width=16, seed=1, heads=(1, 2, 4, 8)))}, tmp_path / "wide.pth"
    )
    message = refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "wide.pth"),
        match="not the weights of swin_x; they look like a Swin of width 16, depths \\(1, 1, 2, 1\\), window 4",
    )
    assert "patch_embed.proj.weight (16, 3, 4, 4) in the file, (8, 3, 4, 4) in the model" in message
    assert "wide.pth" in message and "model.image.weights" in message


def test_a_deeper_sibling_is_refused_though_every_needed_tensor_is_there(tmp_path):
    torch.save({"model": official(swin(depths=(1, 1, 4, 1), seed=1))}, tmp_path / "deep.pth")
    message = refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "deep.pth"),
        match="only in the file",
    )
    assert "layers.2.blocks.2.norm1.weight (32,)" in message and "more" in message


def test_one_missing_tensor_is_refused(tmp_path):
    state = official(swin(seed=1))
    del state["layers.2.blocks.1.attn.qkv.bias"]
    torch.save(state, tmp_path / "swin.pth")
    refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "swin.pth"),
        match=r"missing in the file:\n    layers.2.blocks.1.attn.qkv.bias \(96,\)",
    )


def test_tables_of_other_heads_are_not_interpolated(tmp_path):
    torch.save(
        official(swin(window=7, pixels=224, heads=(2, 2, 4, 8), seed=1)), tmp_path / "swin.pth"
    )
    refused(
        weights.load_image_weights,
        headless(swin(window=12, pixels=384)),
        "swin_x",
        str(tmp_path / "swin.pth"),
        match=r"relative_position_bias_table \(169, 2\) in the file, \(529, 1\) in the model",
    )


def test_damaged_numbers_are_refused(tmp_path):
    state = official(swin(seed=1))
    state["layers.3.blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "swin.pth")
    refused(
        weights.load_image_weights,
        headless(swin()),
        "swin_x",
        str(tmp_path / "swin.pth"),
        match="layers.3.blocks.0.mlp.fc1.weight holds NaN",
    )


def test_hub_means_timms_own_weights(tmp_path, monkeypatch):
    with torch.device("meta"):
        published = timm.create_model("swin_base_patch4_window12_384.ms_in22k").pretrained_cfg
    source, net = swin(seed=1), headless(swin(seed=2))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *names, **_: asked.append(names) or tmp_path / names[1],
    )
    refused(
        weights.load_image_weights,
        net,
        "swin_x",
        "hub",
        match="timm publishes no weights for swin_x",
    )
    net.pretrained_cfg = published
    weights.load_image_weights(net, "swin_x", "hub")
    assert asked == [("timm/swin_base_patch4_window12_384.ms_in22k", "model.safetensors")]
    assert all(
        torch.equal(tensor, source.state_dict()[name]) for name, tensor in net.state_dict().items()
    )
