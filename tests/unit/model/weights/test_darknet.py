"""Darknet's binary weights: files of an independent writer are read exactly, wrong ones refused."""

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
from coupalign.model.weights.darknet import ENCODER_NUMBERS, is_darknet, read_darknet
from coupalign.model.weights.files import read_tensors
from coupalign.model.weights.load import load_image_weights
from coupalign.model.weights.names import guess_contents
from tests.unit.model.weights.encoders import randomize

CLASSES = 3
HEADER = struct.pack("<3iq", 0, 2, 0, 32013312)


@pytest.fixture(scope="module")
def source():
    """timm's Darknet-53 with all numbers different."""
    torch.manual_seed(0)
    return randomize(timm.create_model("darknet53", num_classes=CLASSES).eval())


@pytest.fixture(scope="module")
def file(source):
    """The file that Darknet would write of it.

    Not in pytest's folder, which would keep the 160 MB of the last three runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "darknet53.conv.74"
        with path.open("wb") as out:
            out.write(HEADER)
            for module in source.modules():  # in network order
                if not (hasattr(module, "conv") and hasattr(module, "bn")):
                    continue
                norm = module.bn
                vectors = (norm.bias, norm.weight, norm.running_mean, norm.running_var)
                for tensor in (*vectors, module.conv.weight):
                    out.write(tensor.detach().numpy().astype("<f4").tobytes())
        yield path


@contextmanager
def resized(path: Path, size: int):
    """Truncate the file, or append zeros."""
    whole = path.stat().st_size
    cut = path.read_bytes()[size:] if size < whole else b""
    os.truncate(path, size)
    yield path
    os.truncate(path, min(size, whole))
    with path.open("ab") as out:
        out.write(cut)


def size_with(numbers: float) -> int:
    """Return the bytes of a file with this many numbers."""
    return len(HEADER) + int(4 * numbers)


def encoder_tensors(state):
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("head") and not name.endswith("num_batches_tracked")
    }


def yolo_numbers(classes: int) -> int:
    """Count YOLOv3's numbers after the encoder, from the paper's figure.

    There are three detectors of six convolutions and an output.
    """

    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 4 * outputs

    total = 0
    for entering, width in ((1024, 512), (768, 256), (384, 128)):
        total += conv(entering, width, 1)
        total += 3 * conv(width, 2 * width, 3) + 2 * conv(2 * width, width, 1)
        total += (2 * width + 1) * 3 * (classes + 5)
        if width > 128:  # on the way to the finer detector
            total += conv(width, width // 2, 1)
    return total


# ---------------------------------------------------------------------------------------- reading


def test_every_tensor_is_read_exactly(source, file):
    tensors, want = read_tensors(file), encoder_tensors(source.state_dict())

    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[name], want[name]) for name in want)
    assert guess_contents(tensors) == "darknet53"
    # As large as the authors' own file.
    assert sum(tensor.numel() for tensor in want.values()) == ENCODER_NUMBERS
    assert file.stat().st_size == 162_482_580


def test_old_header_counts_the_images_in_four_bytes(source, file):
    numbers = np.fromfile(file, "<f4", offset=len(HEADER))
    old = file.with_name("old.weights")
    old.write_bytes(struct.pack("<4i", 0, 1, 0, 7) + numbers.tobytes())

    tensors = read_darknet(old)
    old.unlink()

    last = tensors["stages.4.blocks.3.conv2.conv.weight"]
    assert torch.equal(last, source.stages[4].blocks[3].conv2.conv.weight)


@pytest.mark.parametrize(
    "extra, name",
    [
        (yolo_numbers(20), "detector.YOLOv3_of_20_classes"),
        # SPP pools fourfold before one more 1x1 convolution.
        (yolo_numbers(80) + 2048 * 512 + 4 * 512, "detector.YOLOv3-SPP_of_80_classes"),
        (1025 * 1000, "head.fc.weight"),
    ],
)
def test_tensors_after_the_encoder_are_recognized_by_their_size(file, extra, name):
    with resized(file, size_with(ENCODER_NUMBERS + extra)):
        tensors = read_darknet(file)

    assert name in tensors
    assert sum(tensor.numel() for tensor in tensors.values()) == ENCODER_NUMBERS + extra


def test_classifier_is_read(source, file):
    bias, weight = source.head.fc.bias.detach(), source.head.fc.weight.detach()
    size = file.stat().st_size
    with resized(file, size):
        with file.open("ab") as out:
            out.write(bias.numpy().tobytes() + weight.numpy().tobytes())
        tensors = read_darknet(file)
        assert file.stat().st_size - size == 4 * 1025 * CLASSES

    # `resized` has truncated the file again.
    assert file.stat().st_size == size
    assert torch.equal(tensors["head.fc.bias"], bias)
    assert torch.equal(tensors["head.fc.weight"], weight)


# ---------------------------------------------------------------------------------------- loading


def test_first_convolution_is_fitted_to_normalized_pixels(source, file):
    """Inside the border the first layer's output for an image is the same before and after."""
    net = timm.create_model("darknet53", num_classes=0).eval()

    report = load_image_weights(net, "darknet53", str(file))

    # Only the first layer has changed.
    loaded, want = encoder_tensors(net.state_dict()), encoder_tensors(source.state_dict())
    changed = {name for name in want if not torch.equal(loaded[name], want[name])}
    assert changed == {"stem.conv1.conv.weight", "stem.conv1.bn.running_mean"}

    # It computes what Darknet computes from pixels of 0 to 1.
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    small = CoupAlignConfig.model_validate({"image": {"kind": "small"}, "text": {"kind": "small"}})
    model = ReferringModel(small, 9, 32)
    with torch.no_grad():
        normalized = net.stem(model.normalize(image).permute(0, 3, 1, 2))[..., 1:-1, 1:-1]
        as_darknet = source.stem(image.float() / 255)[..., 1:-1, 1:-1]
    assert as_darknet.std() > 0.1
    torch.testing.assert_close(normalized, as_darknet, rtol=1e-5, atol=1e-5)

    # The report says so, and that this network's rectifiers differ.
    assert set(report.loaded) == set(loaded) and not report.left_out and not report.leak
    assert "fitted to normalized" in report.text()
    assert "slope 0.1 below zero, this network's 0.01" in report.text()

    # With Darknet's rectifiers there is nothing to say.
    for module in net.modules():
        if isinstance(module, torch.nn.LeakyReLU):
            module.negative_slope = 0.1
    assert "slope" not in load_image_weights(net, "darknet53", str(file)).text()


def test_encoder_of_a_yolo_is_loaded_with_a_leak_warning(file):
    assert ENCODER_NUMBERS + yolo_numbers(80) == 62_001_757  # yolov3.weights has 248,007,048 bytes
    net = timm.create_model("darknet53", num_classes=0)

    with resized(file, size_with(ENCODER_NUMBERS + yolo_numbers(80))):
        report = load_image_weights(net, "darknet53", str(file))
        guess = guess_contents(read_darknet(file))

    assert guess == "the darknet53 of YOLOv3 of 80 classes"
    detector = ("detector.YOLOv3_of_80_classes", "the detector behind the encoder")
    assert report.left_out == (detector,)
    assert "a whole YOLOv3 of 80 classes" in report.leak and "COCO" in report.leak
    assert report.text().startswith("image: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES.")
    assert report.to_json()["leak"] == report.leak


# ------------------------------------------------------------------------------------ other files


@pytest.mark.parametrize(
    "numbers, message",
    [
        (
            1000,
            r"it has 1,000 numbers. Darknet-53 has 40,620,640 \(162,482,580 bytes .*"
            "truncated, or holds a smaller network",
        ),
        (ENCODER_NUMBERS - 1, "40,620,639 numbers.* truncated"),
        (
            ENCODER_NUMBERS + 1,
            "40,620,641 numbers.* another network .*or something was appended to it",
        ),
        (64_429_405, r"another network \(YOLOv4 has CSPDarknet-53\)"),
        (ENCODER_NUMBERS - 0.5, "ends in the middle of a number. The file is truncated"),
    ],
)
def test_unknown_sizes_are_refused(file, numbers, message):
    size = size_with(numbers)

    with resized(file, size), pytest.raises(InputError, match=message) as caught:
        read_darknet(file)

    assert f"darknet53.conv.74 ({size:,} bytes)" in str(caught.value)


def test_negative_variances_are_refused(file):
    """A network of the same size in another order would have them."""
    position = size_with(96)  # the variances of the first convolution
    with file.open("r+b") as out:
        out.seek(position)
        before = out.read(4)
        out.seek(position)
        out.write(struct.pack("<f", -1.0))
        out.flush()

        message = "some variances in stem.conv1.bn.running_var are below 0"
        with pytest.raises(InputError, match=message):
            read_darknet(file)

        out.seek(position)
        out.write(before)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"PK\x03\x04" + bytes(100),
            r"\(104 bytes\): does not begin with a version as Darknet's .*"
            "a PyTorch file: rename it to .pth",
        ),
        (b"\x80\x02}q\x01" + bytes(100), "rename it to .pth"),
        (b"<!DOCTYPE html><html>", "a web page saved under this name"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (struct.pack("<5i", 0, -3, 0, 0, 0), r"\(found \(0, -3, 0\)\); it is damaged"),
        (b"", "too short for the header"),
    ],
)
def test_files_of_other_formats_are_refused(tmp_path, content, message):
    path = tmp_path / "x.weights"
    path.write_bytes(content)

    with pytest.raises(InputError, match=message) as caught:
        load_image_weights(torch.nn.Identity(), "darknet53", str(path))

    assert "x.weights" in str(caught.value)


def test_missing_file_is_not_looked_up_on_the_hub():
    for name in ("no/darknet53.weights", "no/darknet53.conv.74"):
        assert is_darknet(Path(name))
        with pytest.raises(InputError, match="there is no file or folder"):
            load_image_weights(torch.nn.Identity(), "darknet53", name)

    assert not is_darknet(Path("model.safetensors"))
