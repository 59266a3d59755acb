"""StagedBackbone: an image encoder that runs stage by stage, so that words can be fused in between.

Every stage takes and returns pixels channels-last.

Shape legend: B batch, S input side, H W stage sides, C stage channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coupalign.compat import prepare_torchvision
from coupalign.config.schema import SmallBackbone, TimmBackbone
from coupalign.errors import InputError
from coupalign.model.recompute import run_checkpointed

STRIDES = (4, 8, 16, 32)

_FAMILIES = "swin_*, resnet101 or darknet53"


class StagedBackbone(nn.Module):
    """Four stages at strides 4, 8, 16 and 32: a published encoder or a small one, in `self.net`.

    A published encoder keeps timm's parameter names (`net.layers.0…`, `net.conv1…`, `net.stem…`).

    Attributes:
        channels: C of the four stages.

    Raises:
        InputError: `image_size` is not a multiple of 32, timm does not know the name, or the
            encoder belongs to another family.
    """

    def __init__(self, config: TimmBackbone | SmallBackbone, image_size: int):
        super().__init__()
        if image_size % STRIDES[-1]:
            nearest = max(1, round(image_size / STRIDES[-1])) * STRIDES[-1]
            raise InputError(
                f"data.image_size = {image_size} is not a multiple of {STRIDES[-1]}; "
                f"the nearest is {nearest}"
            )

        self.channels: tuple[int, ...]
        match config:
            case TimmBackbone():
                self.net = _build_timm_net(config, image_size)
                self.channels = tuple(info["num_chs"] for info in self.net.feature_info[-4:])
                # freeze_norm keeps statistics as loaded: a random start has none worth keeping.
                self.frozen_norms = config.freeze_norm and config.weights is not None
            case SmallBackbone():
                self.net = SmallNet(config.widths, config.depths)
                self.channels = config.widths
                self.frozen_norms = False

        self.checkpointing = config.checkpointing
        if self.frozen_norms:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
        self.train(self.training)

    def forward(self, stage: int, x: Tensor) -> Tensor:
        """Run one stage.

        Args:
            stage: 0 to 3.
            x: the image [B, S, S, 3] for stage 0, else the pixels of the stage before.

        Returns:
            pixels [B, H, W, C].
        """
        return run_checkpointed(
            _stage_runner(self.net),
            self.net,
            stage,
            x,
            checkpointing=self.training and self.checkpointing,
        )

    def blocks(self) -> list[nn.Module]:
        """List the modules that the stages consist of, in order."""
        net = self.net
        if isinstance(net, SmallNet):
            return list(net.stages)

        blocks: list[nn.Module] = []
        if _stage_runner(net) is _run_swin:
            for layer in net.layers:
                blocks += [layer.downsample, *layer.blocks]
            return [block for block in blocks if not isinstance(block, nn.Identity)]

        stages = getattr(net, "stages", None)
        if stages is None:
            stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        for stage in stages:
            blocks += getattr(stage, "blocks", stage)
        return blocks

    def train(self, mode: bool = True) -> StagedBackbone:
        """Switch to training or evaluation mode. Frozen BatchNorms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.net.modules() if isinstance(module, _BatchNorm)]


class SmallNet(nn.Module):
    """A small encoder that learns fast from scratch on a CPU.

    A 7x7 stem of stride 4 is followed by residual 3x3 convolutions with GroupNorm.
    Two more input channels hold x and y in -1 .. 1: a sentence says where things are, and
    convolutions alone do not know.
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        stages = []
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            if stage == 0:
                down = _conv_norm(5, width, stride=4, kernel=7)
            else:
                down = _conv_norm(widths[stage - 1], width, stride=2)
            blocks = [ResidualBlock(width) for _ in range(depth)]
            stages.append(nn.Sequential(*down, nn.ReLU(), *blocks))
        self.stages = nn.ModuleList(stages)


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, each with GroupNorm.

    The second norm starts at zero, so the block starts as the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(*_conv_norm(width, width), nn.ReLU(), *_conv_norm(width, width))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return torch.relu(x + self.body(x))


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch per sample, and scale it up where it stays.

    The probability is a tensor. As a Python number, like timm's, it would make torch.compile
    compile every block of an encoder by itself.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - probability), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same shape."""
        if not self.training:
            return x
        kept = torch.bernoulli(self.keep.expand(len(x)))  # [B]
        scale = (kept / self.keep).to(x.dtype)
        other_axes = [1] * (x.ndim - 1)
        return x * scale.view(-1, *other_axes)


def group_norm(width: int) -> nn.GroupNorm:
    """Build a GroupNorm of eight groups, or fewer if eight does not divide the width.

    It normalizes per sample, so no split of a batch changes it.
    """
    return nn.GroupNorm(math.gcd(8, width), width)


def _conv_norm(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(
        inputs, outputs, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, group_norm(outputs)]


def _build_timm_net(config: TimmBackbone, image_size: int) -> nn.Module:
    prepare_torchvision()
    import timm  # here, because the small encoder does not need it
    from timm.models.swin_transformer import SwinTransformer

    options: dict[str, Any] = {}
    if config.name.startswith("swin"):
        options = {"img_size": image_size, "drop_path_rate": config.drop_path}
    if config.name.startswith("darknet"):
        options = {"act_layer": partial(nn.LeakyReLU, negative_slope=config.slope)}

    try:
        net = timm.create_model(
            config.name, pretrained=False, num_classes=0, global_pool="", **options
        )
    except RuntimeError as error:
        raise InputError(f"model.image.name = {config.name}: {error}; use {_FAMILIES}") from error

    _stage_runner(net)  # raises for an unknown family
    if isinstance(net, SwinTransformer):
        _adapt_swin(net)
    return net


def _adapt_swin(net: nn.Module) -> None:
    """Replace timm's final norm, attention path and stochastic depth in place."""
    from timm.layers import DropPath as TimmDropPath
    from timm.models.swin_transformer import WindowAttention

    # Whatever reads the stages has norms of its own.
    net.norm = nn.Identity()

    for module in list(net.modules()):
        # timm's own choice writes the scores of all windows to memory: a third of a step's traffic.
        if isinstance(module, WindowAttention):
            module.fused_attn = True
        for name, child in module.named_children():
            if isinstance(child, TimmDropPath):
                setattr(module, name, DropPath(child.drop_prob))


def _stage_runner(net: nn.Module) -> Callable[[nn.Module, int, Tensor], Tensor]:
    """Return the function that runs one stage of this family of encoders."""
    if isinstance(net, SmallNet):
        return _run_small

    from timm.models.swin_transformer import SwinTransformer

    if isinstance(net, SwinTransformer):
        return _run_swin
    if hasattr(net, "layer4") and hasattr(net, "maxpool"):
        return _run_resnet
    if hasattr(net, "stages") and hasattr(net, "stem") and len(net.stages) == 5:
        return _run_darknet
    raise InputError(
        f"model.image.name: {type(net).__name__} is not of a known family; use {_FAMILIES}"
    )


def _run_swin(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Run a layer. timm's begin with patch merging, so words are fused before down-sampling."""
    if stage == 0:
        x = net.patch_embed(x.permute(0, 3, 1, 2))
    return net.layers[stage](x)


def _run_resnet(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    if stage == 0:
        x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
    return getattr(net, f"layer{stage + 1}")(x).permute(0, 2, 3, 1)


def _run_darknet(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Run a stage. Darknet has five, at strides 2 to 32; the first belongs to the stem here."""
    x = x.permute(0, 3, 1, 2)
    if stage == 0:
        x = net.stages[0](net.stem(x))
    return net.stages[stage + 1](x).permute(0, 2, 3, 1)


def _run_small(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    if stage == 0:
        x = torch.cat([x, _pixel_coordinates(x)], dim=3)
    return net.stages[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _pixel_coordinates(image: Tensor) -> Tensor:
    """Compute x and y of the pixel centers, in -1 .. 1: [B, H, W, 3] -> [B, H, W, 2]."""
    batch, height, width, _ = image.shape
    columns = torch.arange(width, device=image.device, dtype=image.dtype)
    rows = torch.arange(height, device=image.device, dtype=image.dtype)

    x = (columns * 2 + 1) / width - 1
    y = (rows * 2 + 1) / height - 1
    x = x.expand(height, width)
    y = y[:, None].expand(height, width)
    return torch.stack([x, y], dim=2).expand(batch, -1, -1, -1)
