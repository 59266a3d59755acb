"""StagedBackbone: equality with timm's features, frozen norms, sizes, checkpointing, DropPath."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coupalign.config.schema import SmallBackbone, TimmBackbone
from coupalign.errors import InputError
from coupalign.model.backbone import STRIDES, DropPath, StagedBackbone, group_norm

SMALL = SmallBackbone(widths=(8, 8, 16, 16))


def run_stages(backbone: StagedBackbone, image: Tensor) -> list[Tensor]:
    maps, x = [], image
    for stage in range(4):
        x = backbone(stage, x)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    "name, channels",
    [
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
        ("resnet101", (256, 512, 1024, 2048)),
        ("darknet53", (128, 256, 512, 1024)),
    ],
)
def test_stages_equal_features_of_timm(name, channels):
    import timm

    torch.manual_seed(0)
    is_swin = name.startswith("swin")
    backbone = StagedBackbone(TimmBackbone(name=name), 64).eval()
    image = torch.randn(1, 64, 64, 3)

    # timm's feature extractor has the same weights; its names have "_" where the model's have ".".
    options = {"img_size": 64} if is_swin else {"out_indices": (-4, -3, -2, -1)}
    extractor = timm.create_model(name, pretrained=False, features_only=True, **options).eval()
    weights = {key.replace(".", "_"): value for key, value in backbone.net.state_dict().items()}
    extractor.load_state_dict(
        {key: weights[key.replace(".", "_")] for key in extractor.state_dict()}
    )

    with torch.no_grad():
        ours = run_stages(backbone, image)
        theirs = extractor(image.permute(0, 3, 1, 2))

    assert backbone.channels == channels and STRIDES == (4, 8, 16, 32)
    for stride, width, a, b in zip(STRIDES, channels, ours, theirs):
        b = b if is_swin else b.permute(0, 2, 3, 1)
        assert a.shape == (1, 64 // stride, 64 // stride, width)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_swin_fused_window_attention_has_gradients_of_plain_attention():
    """Including shifted and padded windows."""
    torch.manual_seed(0)
    backbone = StagedBackbone(TimmBackbone(name="swin_tiny_patch4_window7_224"), 96).eval()
    image = torch.randn(1, 96, 96, 3)
    windows = [module for module in backbone.net.modules() if hasattr(module, "fused_attn")]
    assert len(windows) == 12 and all(module.fused_attn for module in windows)

    def gradients() -> dict[str, Tensor]:
        backbone.zero_grad()
        sum((stage**2).mean() for stage in run_stages(backbone, image)).backward()
        trained = [(name, p) for name, p in backbone.named_parameters() if p.grad is not None]
        return {name: p.grad.clone() for name, p in trained}

    fused = gradients()
    for module in windows:
        module.fused_attn = False
    plain = gradients()

    for name, expected in plain.items():
        atol = 1e-5 * expected.abs().max().item() + 1e-9
        torch.testing.assert_close(fused[name], expected, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize(
    "name, size",
    [
        ("swin_tiny_patch4_window7_224", 96),
        ("swin_tiny_patch4_window7_224", 160),
        ("swin_base_patch4_window12_384", 416),
    ],
)
def test_swin_accepts_any_multiple_of_32(name, size):
    with torch.device("meta"):
        backbone = StagedBackbone(TimmBackbone(name=name), size)
        maps = run_stages(backbone, torch.empty(1, size, size, 3))

    assert [m.shape[1] for m in maps] == [size // 4, size // 8, size // 16, size // 32]


@pytest.mark.parametrize("weights, frozen", [("some.pth", True), (None, False)])
def test_batch_norms_are_frozen_only_with_loaded_weights(weights, frozen):
    with torch.device("meta"):
        backbone = StagedBackbone(TimmBackbone(name="resnet101", weights=weights), 64)

    backbone.train()

    norm = backbone.net.bn1
    assert norm.training is not frozen and norm.weight.requires_grad is not frozen
    assert backbone.net.layer1.training and backbone.net.conv1.weight.requires_grad


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_checkpointing_keeps_gradients_and_small_net_is_independent_of_the_batch(checkpointing):
    torch.manual_seed(0)
    plain = StagedBackbone(SMALL, 64)
    saving = StagedBackbone(SMALL.model_copy(update={"checkpointing": checkpointing}), 64)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 64, 64, 3)

    for backbone in (plain, saving):
        run_stages(backbone, image)[3].square().sum().backward()

    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(run_stages(plain, image[:1])[3], run_stages(plain, image)[3][:1])


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(InputError, match="nearest is 96"):
        StagedBackbone(SmallBackbone(), 100)

    with pytest.raises(InputError, match="no_such_net"):
        StagedBackbone(TimmBackbone(name="no_such_net"), 64)

    with torch.device("meta"), pytest.raises(InputError, match="not of a known family"):
        StagedBackbone(TimmBackbone(name="vit_tiny_patch16_224"), 224)


def test_drop_path_drops_whole_samples_and_scales_the_others():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 3, 2)

    out = drop(x)

    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("width, groups", [(8, 8), (32, 8), (12, 4), (7, 1)])
def test_group_norm_has_at_most_eight_groups_that_divide_the_width(width, groups):
    assert group_norm(width).num_groups == groups
