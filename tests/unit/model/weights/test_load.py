"""Pretrained image encoders: every kind of file loads exactly, and a wrong file changes nothing."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

from coupalign.model.weights.load import load_image_weights
from coupalign.model.weights.names import guess_contents
from tests.unit.model.weights.encoders import (
    assert_refused,
    equals_source,
    headless,
    official,
    randomize,
    swin,
)
from tests.unit.model.weights.test_names import bicubic_1d

# ------------------------------------------------------------------------------------------- Swin


def test_official_swin_gives_the_same_features(tmp_path):
    source, net = swin(seed=1), headless(swin(seed=2))
    path = tmp_path / "swin.pth"
    torch.save({"model": official(source), "epoch": 3}, path)

    report = load_image_weights(net, "swin_x", str(path))

    image = torch.randn(2, 3, 128, 128)
    assert torch.equal(net.forward_features(image), headless(source).forward_features(image))

    assert set(report.loaded) == set(net.state_dict())
    assert not report.interpolated and not report.missing
    reasons = {reason for _, reason in report.left_out}
    assert reasons == {"derived", "the classifier", "the norm after the last stage"}
    names = {name for name, _ in report.left_out}
    assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= names
    assert "official Swin names" in report.text() and "head.weight" in report.text()
    assert json.loads(json.dumps(report.to_json()))["random"] is False


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "model.", "encoder.", "module.backbone."]
)
def test_prefixes_are_taken_off_and_reported(tmp_path, prefix):
    source, net = swin(seed=1), headless(swin(seed=2))
    path = tmp_path / "swin.pt"
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if prefix:
        state["decode_head.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, path)

    report = load_image_weights(net, "swin_x", str(path))

    assert equals_source(net, source)
    assert (repr(prefix) in report.text()) == bool(prefix)
    left_out = ("decode_head.weight", f"not below {prefix!r}")
    assert (left_out in report.left_out) == bool(prefix)


def test_final_norm_is_loaded_and_a_smaller_classifier_is_kept(tmp_path):
    source, net = swin(seed=1), swin(seed=2, classes=3)
    path = tmp_path / "swin.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    head = net.head.fc.weight.clone()

    report = load_image_weights(net, "swin_x", str(path))

    assert torch.equal(net.norm.weight, source.norm.weight) and "norm.weight" in report.loaded
    assert torch.equal(net.head.fc.weight, head)
    assert report.missing == ("head.fc.weight", "head.fc.bias")
    assert ("head.fc.bias", "the classifier") in report.left_out


def bicubic(table, entries):
    """Resize by the official rule from its definition, one axis at a time."""
    old, new = round(len(table) ** 0.5), round(entries**0.5)
    rows = torch.from_numpy(bicubic_1d(old, new))
    grid = table.double().view(old, old, -1)
    return torch.einsum("yi,xj,ijh->yxh", rows, rows, grid).reshape(entries, -1).float()


def shift_mask(side, window, shift):
    """Compute by hand which pairs of a shifted window must not meet, [windows, w*w, w*w].

    They are the ones that the roll brought together.
    """
    region = torch.zeros(side, dtype=torch.long)
    region[side - window :] = 1
    region[side - shift :] = 2
    regions = 3 * region[:, None] + region

    windows = []
    for y in range(0, side, window):
        for x in range(0, side, window):
            windows.append(regions[y : y + window, x : x + window].flatten())
    return torch.stack([(w[:, None] != w) * -100.0 for w in windows])


def relative_positions(window):
    """Compute by hand the entry of the table for each pair of a window, [w*w, w*w]."""
    positions = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offset = positions[:, None] - positions + window - 1
    return offset[..., 0] * (2 * window - 1) + offset[..., 1]


@pytest.mark.parametrize(
    "window, pixels, new_window, new_pixels, resized",
    [
        (7, 224, 12, 384, 5),
        (12, 384, 7, 224, 5),
        (7, 224, 7, 448, 0),
        # The last stage has 6 x 6 positions, fewer than the window.
        (12, 384, 12, 192, 1),
    ],
)
def test_only_the_tables_are_interpolated_for_another_window_or_resolution(
    tmp_path, window, pixels, new_window, new_pixels, resized
):
    source, net = swin(window, pixels, seed=1), headless(swin(new_window, new_pixels, seed=2))
    path = tmp_path / "swin.pth"
    torch.save({"model": official(source)}, path)

    report = load_image_weights(net, "swin_x", str(path))

    # The report names the tables.
    tables = {name for name, _, _ in report.interpolated}
    assert len(tables) == resized
    assert all(name.endswith("relative_position_bias_table") for name in tables)
    assert set(report.loaded) == set(net.state_dict()) - tables
    if resized == 5:
        assert "and 3 more" in report.text()

    # Tables are resized as by definition and as by timm; everything else is copied.
    for name, tensor in net.state_dict().items():
        expected = source.state_dict()[name]
        if name in tables:
            # fp32 places the samples to about 2e-6 of a step.
            torch.testing.assert_close(tensor, bicubic(expected, len(tensor)), rtol=1e-5, atol=1e-5)
            side = round((len(tensor) ** 0.5 + 1) / 2)
            expected = resize_rel_pos_bias_table_simple(expected, (side, side), tensor.shape)
        assert torch.equal(tensor, expected), name

    # The derived buffers are those of the new resolution. If one window holds the whole stage,
    # nothing is shifted.
    shifted, side = net.layers[2].blocks[1], new_pixels // 16
    if side > new_window:
        assert torch.equal(shifted.attn_mask, shift_mask(side, new_window, new_window // 2))
    assert torch.equal(shifted.attn.relative_position_index, relative_positions(new_window))


def test_weights_of_a_run_are_recognized(tmp_path):
    """Their photographs are those of that run, which the leak guard must know."""
    net = timm.create_model("resnet18", num_classes=0)
    state = net.state_dict()
    torch.save(state, tmp_path / "timm.pth")
    torch.save({f"image.net.{name}": value for name, value in state.items()}, tmp_path / "run.pth")

    assert not load_image_weights(net, "resnet18", str(tmp_path / "timm.pth")).is_ours
    assert load_image_weights(net, "resnet18", str(tmp_path / "run.pth")).is_ours


# ----------------------------------------------------------------------------- ResNet and Darknet


@pytest.fixture(scope="module")
def resnet():
    return randomize(torchvision.models.resnet101()).eval()


def test_torchvision_resnet101_gives_the_same_features(tmp_path, resnet):
    # A plain start keeps the activations of 101 layers in range.
    with torch.no_grad():
        for module in resnet.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(0.5)
    state = {
        name: tensor
        for name, tensor in resnet.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    net = timm.create_model("resnet101", num_classes=0).eval()

    # From torchvision's file.
    path = tmp_path / "resnet101-5d3b4d8f.pth"
    torch.save(state, path)
    report = load_image_weights(net, "resnet101", str(path))

    image = torch.randn(1, 3, 64, 64)
    resnet.fc = torch.nn.Identity()
    with torch.no_grad():
        expected, features = resnet(image), net(image)
    assert expected.std() > 0 and torch.allclose(features, expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in report.left_out} == {"fc.weight", "fc.bias"}
    assert report.missing and all(name.endswith("num_batches_tracked") for name in report.missing)

    # From timm's file.
    path = tmp_path / "timm.safetensors"
    classifier = {"fc.weight": torch.zeros(2, 2048)}
    safetensors.torch.save_file(net.state_dict() | classifier, path)
    report = load_image_weights(randomize(net), "resnet101", str(path))

    assert set(report.loaded) == set(net.state_dict())
    assert report.left_out == (("fc.weight", "the classifier"),)
    assert torch.equal(net.layer4[2].bn3.running_var, resnet.layer4[2].bn3.running_var)

    # A ResNet-50 is refused.
    path = tmp_path / "resnet50.pth"
    torch.save(without_blocks_of_resnet101(state), path)
    message = assert_refused(
        load_image_weights, net, "resnet101", str(path), match="look like resnet50"
    )
    assert "missing in the file:\n    layer3.6.conv1.weight (256, 1024, 1, 1)" in message


def without_blocks_of_resnet101(state):
    """Drop the blocks of the third stage that a ResNet-50 does not have."""
    extra = {f"layer3.{block}" for block in range(6, 23)}
    return {
        name: tensor for name, tensor in state.items() if ".".join(name.split(".")[:2]) not in extra
    }


def test_darknet53_under_timm_names(tmp_path):
    source = timm.create_model("darknet53")
    net = timm.create_model("darknet53", num_classes=0)
    path = str(tmp_path / "darknet.safetensors")
    safetensors.torch.save_file(source.state_dict(), path)

    report = load_image_weights(net, "darknet53", path)

    assert equals_source(net, source)
    assert len(report.loaded) == len(net.state_dict())
    assert guess_contents(source.state_dict()) == "darknet53"
    assert_refused(
        load_image_weights, headless(swin()), "swin_x", path, match="look like darknet53"
    )


# ---------------------------------------------------------------------------- files of other models


def test_another_width_names_tensors_with_both_shapes(tmp_path):
    path = tmp_path / "wide.pth"
    torch.save({"model": official(swin(width=16, seed=1))}, path)

    message = assert_refused(
        load_image_weights,
        headless(swin()),
        "swin_x",
        str(path),
        match="not the weights of swin_x; "
        r"they look like a Swin of width 16, depths \(1, 1, 2, 1\), window 4",
    )

    assert "patch_embed.proj.weight (16, 3, 4, 4) in the file, (8, 3, 4, 4) in the model" in message
    assert "wide.pth" in message and "model.image.weights" in message


def test_deeper_sibling_is_refused_although_no_tensor_is_missing(tmp_path):
    path = tmp_path / "deep.pth"
    torch.save({"model": official(swin(depths=(1, 1, 4, 1), seed=1))}, path)

    message = assert_refused(
        load_image_weights, headless(swin()), "swin_x", str(path), match="only in the file"
    )

    assert "layers.2.blocks.2.norm1.weight (32,)" in message and "more" in message


def test_one_missing_tensor_is_refused(tmp_path):
    path = tmp_path / "swin.pth"
    state = official(swin(seed=1))
    del state["layers.2.blocks.1.attn.qkv.bias"]
    torch.save(state, path)

    assert_refused(
        load_image_weights,
        headless(swin()),
        "swin_x",
        str(path),
        match=r"missing in the file:\n    layers.2.blocks.1.attn.qkv.bias \(96,\)",
    )


def test_tables_with_other_heads_are_not_interpolated(tmp_path):
    path = tmp_path / "swin.pth"
    torch.save(official(swin(window=7, pixels=224, heads=(2, 2, 4, 8), seed=1)), path)

    assert_refused(
        load_image_weights,
        headless(swin(window=12, pixels=384)),
        "swin_x",
        str(path),
        match=r"relative_position_bias_table \(169, 2\) in the file, \(529, 1\) in the model",
    )


def test_file_with_nan_is_refused(tmp_path):
    path = tmp_path / "swin.pth"
    state = official(swin(seed=1))
    state["layers.3.blocks.0.mlp.fc1.weight"][0, 0] = float("nan")
    torch.save(state, path)

    assert_refused(
        load_image_weights,
        headless(swin()),
        "swin_x",
        str(path),
        match="layers.3.blocks.0.mlp.fc1.weight holds NaN",
    )


def test_hub_means_timms_own_weights(tmp_path, monkeypatch):
    source, net = swin(seed=1), headless(swin(seed=2))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repository, name, **_):
        asked.append((repository, name))
        return tmp_path / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    # A model that timm does not publish.
    message = "timm publishes no weights for swin_x"
    assert_refused(load_image_weights, net, "swin_x", "hub", match=message)

    # A model that it does.
    name = "swin_base_patch4_window12_384.ms_in22k"
    with torch.device("meta"):
        net.pretrained_cfg = timm.create_model(name).pretrained_cfg
    load_image_weights(net, "swin_x", "hub")

    assert asked == [(f"timm/{name}", "model.safetensors")]
    assert equals_source(net, source)
