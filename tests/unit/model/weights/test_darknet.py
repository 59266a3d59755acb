"""Darknet's binary weights: read exactly as an independent writer wrote them, fitted to normalized pixels, refused where wrong."""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from coupalign.config.schema import CoupAlignConfig
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.weights import load as weights
from coupalign.model.weights.darknet import (
    NUMBERS,
    is_darknet,
    read_darknet,
)
from coupalign.model.weights.files import read_tensors
from coupalign.model.weights.names import looks_like

CLASSES = 3
HEADER = struct.pack("<3iq", 0, 2, 0, 32013312)


@pytest.fixture(scope="module")
def source():
    """timm's Darknet-53, every number its own."""
    torch.manual_seed(0)
    net = timm.create_model("darknet53", num_classes=CLASSES).eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.3) if tensor.ndim == 1 else tensor.normal_(0, 0.1)
    return net


@pytest.fixture(scope="module")
def file(source):
    """What Darknet would write of it. Not in pytest's folder, which keeps the 160 MB of the last three runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "darknet53.conv.74"
        with path.open("wb") as out:
            out.write(HEADER)
            for module in source.modules():  # in the order of the network
                if hasattr(module, "conv") and hasattr(module, "bn"):
                    for tensor in (
                        module.bn.bias,
                        module.bn.weight,
                        module.bn.running_mean,
                        module.bn.running_var,
                        module.conv.weight,
                    ):
                        out.write(tensor.detach().numpy().astype("<f4").tobytes())
        yield path


@contextmanager
def resized(path: Path, size: int):
    """The file cut off, or continued by zeros."""
    before = path.read_bytes()[size:] if size < path.stat().st_size else b""
    whole = path.stat().st_size
    os.truncate(path, size)
    yield path
    os.truncate(path, min(size, whole))
    with path.open("ab") as out:
        out.write(before)


def encoder(state):
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("head") and not name.endswith("num_batches_tracked")
    }


def test_every_tensor_is_read_exactly(source, file):
    found, want = read_tensors(file), encoder(source.state_dict())
    assert found.keys() == want.keys() and all(
        torch.equal(found[name], want[name]) for name in want
    )
    assert (
        sum(tensor.numel() for tensor in want.values()) == NUMBERS
        and file.stat().st_size == 162_482_580
    )  # as the authors' own
    assert looks_like(found) == "darknet53"


def test_an_old_header_counts_the_images_in_four_bytes(source, file, tmp_path):
    numbers = np.fromfile(file, "<f4", offset=len(HEADER))
    old = file.with_name("old.weights")
    old.write_bytes(struct.pack("<4i", 0, 1, 0, 7) + numbers.tobytes())
    found = read_darknet(old)
    old.unlink()
    assert torch.equal(
        found["stages.4.blocks.3.conv2.conv.weight"], source.stages[4].blocks[3].conv2.conv.weight
    )


def test_loading_fits_the_first_convolution_to_normalized_pixels(source, file):
    """Darknet reads 0 .. 1. Inside the border its first layer says the same of a picture before and after."""
    net = timm.create_model("darknet53", num_classes=0).eval()
    report = weights.load_image_weights(net, "darknet53", str(file))
    fitted = {"stem.conv1.conv.weight", "stem.conv1.bn.running_mean"}
    loaded, want = encoder(net.state_dict()), encoder(source.state_dict())
    assert {name for name in want if not torch.equal(loaded[name], want[name])} == fitted
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    model = ReferringModel(
        CoupAlignConfig.model_validate({"image": {"kind": "small"}, "text": {"kind": "small"}}),
        9,
        32,
    )
    with torch.no_grad():
        seen = net.stem(model.normalized(image).permute(0, 3, 1, 2))
        as_darknet = source.stem(image.float() / 255)
    assert as_darknet.std() > 0.1
    torch.testing.assert_close(
        seen[..., 1:-1, 1:-1], as_darknet[..., 1:-1, 1:-1], rtol=1e-5, atol=1e-5
    )
    assert set(report.loaded) == set(loaded) and not report.left_out and not report.leak
    assert (
        "fitted to normalized" in report.text()
        and "slope 0.1 below zero, this network's 0.01" in report.text()
    )
    for module in net.modules():
        if isinstance(module, torch.nn.LeakyReLU):
            module.negative_slope = 0.1
    assert "slope" not in weights.load_image_weights(net, "darknet53", str(file)).text()


def yolo_numbers(classes: int) -> int:
    """YOLOv3's layers behind the encoder, from the paper's figure: three detectors of six convolutions and an output."""

    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 4 * outputs

    total = 0
    for entering, width in ((1024, 512), (768, 256), (384, 128)):
        total += (
            conv(entering, width, 1) + 3 * conv(width, 2 * width, 3) + 2 * conv(2 * width, width, 1)
        )
        total += (2 * width + 1) * 3 * (classes + 5)
        total += (
            conv(width, width // 2, 1) if width > 128 else 0
        )  # on the way to the finer detector
    return total


def test_a_yolo_gives_its_encoder_and_is_said_to_know_the_test_images(source, file):
    assert NUMBERS + yolo_numbers(80) == 62_001_757  # yolov3.weights has 248,007,048 bytes
    with resized(file, 20 + 4 * (NUMBERS + yolo_numbers(80))):
        report = weights.load_image_weights(
            timm.create_model("darknet53", num_classes=0), "darknet53", str(file)
        )
        likeness = looks_like(read_darknet(file))
    assert likeness == "the darknet53 of YOLOv3 of 80 classes"
    assert report.left_out == (
        ("detector.YOLOv3_of_80_classes", "the detector behind the encoder"),
    )
    assert "a whole YOLOv3 of 80 classes" in report.leak and "COCO" in report.leak
    assert (
        report.text().startswith("image: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES.")
        and report.to_json()["leak"] == report.leak
    )


@pytest.mark.parametrize(
    "extra, name",
    [
        (yolo_numbers(20), "detector.YOLOv3_of_20_classes"),
        (
            yolo_numbers(80) + 2048 * 512 + 4 * 512,
            "detector.YOLOv3-SPP_of_80_classes",
        ),  # pooled fourfold before one more 1x1
        (1025 * 1000, "head.fc.weight"),
    ],
)
def test_what_follows_the_encoder_is_known_by_its_size(file, extra, name):
    with resized(file, 20 + 4 * (NUMBERS + extra)):
        found = read_darknet(file)
    assert sum(tensor.numel() for tensor in found.values()) == NUMBERS + extra and name in found


def test_a_classifier_keeps_its_place(source, file):
    with resized(file, file.stat().st_size):
        with file.open("ab") as out:
            out.write(
                source.head.fc.bias.detach().numpy().tobytes()
                + source.head.fc.weight.detach().numpy().tobytes()
            )
        found, size = read_darknet(file), file.stat().st_size
    assert torch.equal(found["head.fc.bias"], source.head.fc.bias) and torch.equal(
        found["head.fc.weight"], source.head.fc.weight
    )
    assert size - file.stat().st_size == 4 * 1025 * CLASSES


@pytest.mark.parametrize(
    "numbers, message",
    [
        (
            1000,
            r"1,000 numbers are in the file. Darknet-53 has 40,620,640 \(162,482,580 bytes .*cut off, or holds a smaller network",
        ),
        (NUMBERS - 1, "40,620,639 numbers .* cut off"),
        (
            NUMBERS + 1,
            "40,620,641 numbers .* another network .*or something was written behind its end",
        ),
        (64_429_405, r"another network \(YOLOv4 has CSPDarknet-53\)"),
        (NUMBERS - 0.5, "ends within a number. The file was cut off"),
    ],
)
def test_other_sizes_are_refused(file, numbers, message):
    with resized(file, 20 + int(4 * numbers)), pytest.raises(InputError, match=message) as caught:
        read_darknet(file)
    assert f"darknet53.conv.74 ({20 + int(4 * numbers):,} bytes)" in str(caught.value)


def test_a_network_in_another_order_is_refused(file):
    with file.open("r+b") as out:
        out.seek(20 + 4 * 96)  # the variances of the first convolution
        before = out.read(4)
        out.seek(20 + 4 * 96)
        out.write(struct.pack("<f", -1.0))
        out.flush()
        with pytest.raises(
            InputError, match="the variances stem.conv1.bn.running_var are not all 0 or more"
        ):
            read_darknet(file)
        out.seek(20 + 4 * 96)
        out.write(before)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"PK\x03\x04" + bytes(100),
            r"\(104 bytes\): does not begin as Darknet's .*a file of PyTorch's: rename it to .pth",
        ),
        (b"\x80\x02}q\x01" + bytes(100), "rename it to .pth"),
        (b"<!DOCTYPE html><html>", "a web page was saved in its place"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (struct.pack("<5i", 0, -3, 0, 0, 0), r"a version \(found \(0, -3, 0\)\); it is damaged"),
        (b"", "too short for the header"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x.weights").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        weights.load_image_weights(torch.nn.Identity(), "darknet53", str(tmp_path / "x.weights"))
    assert "x.weights" in str(caught.value)


def test_a_missing_file_is_not_looked_for_on_the_hub():
    for name in ("no/darknet53.weights", "no/darknet53.conv.74"):
        assert is_darknet(Path(name))
        with pytest.raises(InputError, match="there is no file or folder"):
            weights.load_image_weights(torch.nn.Identity(), "darknet53", name)
    assert not is_darknet(Path("model.safetensors"))
