"""StagedBackbone: an image encoder that is run stage by stage, so that words can be fused in between.

Every stage takes and gives pixels channels-last. Shape legend: B batch, S input side, H W stage sides, C stage channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from coupalign.compat import prepare_torchvision
from coupalign.config.schema import SmallBackbone, TimmBackbone
from coupalign.errors import InputError
from coupalign.model import recompute

STRIDES = (4, 8, 16, 32)


class StagedBackbone(nn.Module):
    """Four stages at strides 4, 8, 16 and 32: a published encoder or a small one, both below `self.net`.

    A published encoder keeps timm's own parameter names (`net.layers.0…`, `net.conv1…`, `net.stem…`).

    Attributes:
        channels: C of the four stages.
        strides: (4, 8, 16, 32).

    Raises:
        InputError: `image_size` is no multiple of 32; the name is unknown to timm, or of another family.
    """

    def __init__(self, config: TimmBackbone | SmallBackbone, image_size: int):
        super().__init__()
        if image_size % STRIDES[-1]:
            raise InputError(
                f"data.image_size = {image_size} is not a multiple of {STRIDES[-1]}; "
                f"the nearest is {max(1, round(image_size / STRIDES[-1])) * STRIDES[-1]}"
            )
        match config:
            case TimmBackbone():
                self.net = _timm_net(config, image_size)
                self.channels: tuple[int, ...] = tuple(
                    info["num_chs"] for info in self.net.feature_info[-4:]
                )
                # Statistics are kept "as loaded": a random start has none worth keeping.
                self.frozen_norms = config.freeze_norm and config.weights is not None
            case SmallBackbone():
                self.net = SmallNet(config.widths, config.depths)
                self.channels = config.widths
                self.frozen_norms = False
        self.strides = STRIDES
        self.checkpointing = config.checkpointing
        if self.frozen_norms:
            for norm in self._batch_norms():
                norm.requires_grad_(False)
        self.train(self.training)

    def forward(self, stage: int, x: Tensor) -> Tensor:
        """Run one stage, 0 to 3: the image [B, S, S, 3] or the pixels of the stage before -> [B, H, W, C]."""
        return recompute.run(
            _runner(self.net),
            self.net,
            stage,
            x,
            checkpointing=self.training and self.checkpointing,
        )

    def blocks(self) -> list[nn.Module]:
        """The modules that the stages are made of, in order."""
        net = self.net
        if isinstance(net, SmallNet):
            return list(net.stages)
        if _runner(net) is _run_swin:
            return [
                part
                for layer in net.layers
                for part in (layer.downsample, *layer.blocks)
                if not isinstance(part, nn.Identity)
            ]
        stages = (
            net.stages
            if hasattr(net, "stages")
            else [getattr(net, f"layer{stage}") for stage in range(1, 5)]
        )
        return [block for stage in stages for block in getattr(stage, "blocks", stage)]

    def train(self, mode: bool = True) -> StagedBackbone:
        """As of any module, but frozen BatchNorms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._batch_norms():
                norm.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [
            module
            for module in self.net.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]


class SmallNet(nn.Module):
    """A small encoder that learns fast from scratch on a CPU: a 7x7 stem of stride 4, residual 3x3 convolutions with GroupNorm.

    Two further input channels hold x and y in -1 .. 1: a sentence says where things are, and convolutions alone do not know.
    """

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        stages = []
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            down = (
                _conv_norm(5, width, stride=4, kernel=7)
                if stage == 0
                else _conv_norm(widths[stage - 1], width, stride=2)
            )
            stages.append(
                nn.Sequential(*down, nn.ReLU(), *[ResidualBlock(width) for _ in range(depth)])
            )
        self.stages = nn.ModuleList(stages)


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, each with GroupNorm; the second norm starts at zero, so that the block starts as x."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(*_conv_norm(width, width), nn.ReLU(), *_conv_norm(width, width))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return torch.relu(x + self.body(x))


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is left out, sample by sample, and scaled up where it stays.

    The probability is a tensor. As a number of the code, like timm's, it would have every block of an encoder compiled by itself.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - probability), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same shape."""
        if not self.training:
            return x
        kept = torch.bernoulli(self.keep.expand(len(x)))
        return x * (kept / self.keep).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm of eight groups, of fewer where eight does not divide the width; per sample, so no batch split changes it."""
    return nn.GroupNorm(math.gcd(8, width), width)


def _conv_norm(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, group_norm(outputs)]


def _timm_net(config: TimmBackbone, image_size: int) -> nn.Module:
    prepare_torchvision()
    import timm  # here, since the small encoder does not need it
    from timm.models.swin_transformer import SwinTransformer, WindowAttention

    options: dict = {}
    if config.name.startswith("swin"):
        options = {"img_size": image_size, "drop_path_rate": config.drop_path}
    if config.name.startswith("darknet"):
        options = {"act_layer": partial(nn.LeakyReLU, negative_slope=config.slope)}
    try:
        net = timm.create_model(
            config.name, pretrained=False, num_classes=0, global_pool="", **options
        )
    except RuntimeError as error:
        raise InputError(
            f"model.image.name = {config.name}: {error}; use swin_*, resnet101 or darknet53"
        ) from error
    _runner(net)
    if isinstance(net, SwinTransformer):
        net.norm = nn.Identity()  # the readers of the stages have norms of their own
        for module in list(net.modules()):
            if isinstance(module, WindowAttention):
                module.fused_attn = True  # timm's own choice writes the scores of all windows down, a third of the bytes of a step
            for name, child in module.named_children():
                if isinstance(child, timm.layers.DropPath):
                    setattr(module, name, DropPath(child.drop_prob))
    return net


def _runner(net: nn.Module) -> Callable[[nn.Module, int, Tensor], Tensor]:
    """How the stages of this family are run."""
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
        f"model.image.name: {type(net).__name__} is not of a known family; use swin_*, resnet101 or darknet53"
    )


def _run_swin(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    """timm's layers begin with their patch merging, so fusion after a layer comes before the down-sampling."""
    if stage == 0:
        x = net.patch_embed(x.permute(0, 3, 1, 2))
    return net.layers[stage](x)


def _run_resnet(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    x = x.permute(0, 3, 1, 2)
    if stage == 0:
        x = net.maxpool(net.act1(net.bn1(net.conv1(x))))
    return getattr(net, f"layer{stage + 1}")(x).permute(0, 2, 3, 1)


def _run_darknet(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Five stages at strides 2 to 32; the first belongs to the stem here."""
    x = x.permute(0, 3, 1, 2)
    if stage == 0:
        x = net.stages[0](net.stem(x))
    return net.stages[stage + 1](x).permute(0, 2, 3, 1)


def _run_small(net: nn.Module, stage: int, x: Tensor) -> Tensor:
    if stage == 0:
        x = torch.cat([x, _coordinates(x)], dim=3)
    return net.stages[stage](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _coordinates(x: Tensor) -> Tensor:
    """[B, H, W, 3] -> x and y of the pixel centers in -1 .. 1, [B, H, W, 2]."""
    batch, height, width, _ = x.shape
    down = (torch.arange(height, device=x.device, dtype=x.dtype) * 2 + 1) / height - 1
    along = (torch.arange(width, device=x.device, dtype=x.dtype) * 2 + 1) / width - 1
    return torch.stack(
        [along.expand(height, width), down[:, None].expand(height, width)], dim=2
    ).expand(batch, -1, -1, -1)
