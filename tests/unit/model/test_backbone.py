"""StagedBackbone against timm's own feature extraction, norms that stay frozen, sizes."""

from __future__ import annotations

import pytest
import torch

from coupalign.config.schema import SmallBackbone, TimmBackbone
from coupalign.errors import InputError
from coupalign.model.backbone import StagedBackbone


def run(backbone: StagedBackbone, image):
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
def test_stages_equal_the_features_of_timm(name, channels):
    import timm

    torch.manual_seed(0)
    backbone = StagedBackbone(TimmBackbone(name=name), 64).eval()
    image = torch.randn(1, 64, 64, 3)
    options = {"img_size": 64} if name.startswith("swin") else {"out_indices": (-4, -3, -2, -1)}
    other = timm.create_model(name, pretrained=False, features_only=True, **options).eval()
    known = {key.replace(".", "_"): value for key, value in backbone.net.state_dict().items()}
    other.load_state_dict({key: known[key.replace(".", "_")] for key in other.state_dict()})
    with torch.no_grad():
        ours, theirs = run(backbone, image), other(image.permute(0, 3, 1, 2))
    assert backbone.channels == channels and backbone.strides == (4, 8, 16, 32)
    for stride, c, a, b in zip(backbone.strides, channels, ours, theirs):
        assert a.shape == (1, 64 // stride, 64 // stride, c)
        torch.testing.assert_close(
            a, b if name.startswith("swin") else b.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5
        )


def test_the_fused_attention_of_windows_has_the_gradients_of_the_plain_one():
    """Shifted and padded windows included."""
    torch.manual_seed(0)
    backbone = StagedBackbone(TimmBackbone(name="swin_tiny_patch4_window7_224"), 96).eval()
    image = torch.randn(1, 96, 96, 3)
    windows = [module for module in backbone.net.modules() if hasattr(module, "fused_attn")]
    assert len(windows) == 12 and all(module.fused_attn for module in windows)

    def gradients() -> dict[str, torch.Tensor]:
        backbone.zero_grad()
        sum((stage**2).mean() for stage in run(backbone, image)).backward()
        return {
            name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None
        }

    fused = gradients()
    for module in windows:
        module.fused_attn = False
    for name, plain in gradients().items():
        torch.testing.assert_close(
            fused[name], plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item() + 1e-9, msg=name
        )


@pytest.mark.parametrize(
    "name, size",
    [
        ("swin_tiny_patch4_window7_224", 96),
        ("swin_tiny_patch4_window7_224", 160),
        ("swin_base_patch4_window12_384", 416),
    ],
)
def test_swin_takes_any_multiple_of_32(name, size):
    with torch.device("meta"):
        maps = run(StagedBackbone(TimmBackbone(name=name), size), torch.empty(1, size, size, 3))
    assert [m.shape[1] for m in maps] == [size // 4, size // 8, size // 16, size // 32]


@pytest.mark.parametrize("weights, frozen", [("some.pth", True), (None, False)])
def test_batch_norms_are_frozen_as_loaded(weights, frozen):
    with torch.device("meta"):
        backbone = StagedBackbone(TimmBackbone(name="resnet101", weights=weights), 64)
    backbone.train()
    assert (
        backbone.net.bn1.training is not frozen
        and backbone.net.bn1.weight.requires_grad is not frozen
    )
    assert backbone.net.layer1.training and backbone.net.conv1.weight.requires_grad


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_checkpointing_changes_nothing_and_the_small_net_needs_no_batch(checkpointing):
    torch.manual_seed(0)
    plain = StagedBackbone(SmallBackbone(widths=(8, 8, 16, 16)), 64)
    saving = StagedBackbone(SmallBackbone(widths=(8, 8, 16, 16), checkpointing=checkpointing), 64)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 64, 64, 3)
    for backbone in (plain, saving):
        run(backbone, image)[3].square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(run(plain, image[:1])[3], run(plain, image)[3][:1])


def test_bad_names_and_sizes_are_refused():
    with pytest.raises(InputError, match="nearest is 96"):
        StagedBackbone(SmallBackbone(), 100)
    with pytest.raises(InputError, match="no_such_net"):
        StagedBackbone(TimmBackbone(name="no_such_net"), 64)
    with torch.device("meta"), pytest.raises(InputError, match="not of a known family"):
        StagedBackbone(TimmBackbone(name="vit_tiny_patch16_224"), 224)
