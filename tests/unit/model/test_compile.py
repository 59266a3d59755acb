"""Compiling by region: no graph break in any method, eager numbers, few variants, a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from coupalign.config.schema import (
    CoupAlignConfig,
    DecoderConfig,
    LavtConfig,
    LtsConfig,
    LtsSegmentConfig,
    ModelConfig,
    ProposalsConfig,
    RefineConfig,
    SmallBackbone,
    SmallText,
    TimmBackbone,
    VltConfig,
    VltTransformerConfig,
    WideDecoderConfig,
)
from coupalign.model.backbone import DropPath, StagedBackbone
from coupalign.model.build import build_model
from coupalign.model.compile import compile_regions

VOCABULARY, SIZE = 50, 64
SMALL_IMAGE = SmallBackbone(widths=(8, 8, 16, 16))
SMALL_TEXT = SmallText(width=16, heads=2, dropout=0.1)

COUPALIGN = CoupAlignConfig(
    image=TimmBackbone(name="swin_tiny_patch4_window7_224", drop_path=0.2),
    text=SMALL_TEXT,
    decoder=DecoderConfig(width=16, depth=2),
    refine=RefineConfig(points=8),
    proposals=ProposalsConfig(count=4, layers=2, heads=2, ffn=32, stages=(3, 4)),
)
LAVT = LavtConfig(
    image=TimmBackbone(name="resnet101"), text=SMALL_TEXT, decoder=WideDecoderConfig(width=8)
)
VLT = VltConfig(
    image=SMALL_IMAGE,
    text=SMALL_TEXT,
    transformer=VltTransformerConfig(
        count=4, width=16, encoder_layers=2, decoder_layers=1, heads=2, ffn=32
    ),
)
LTS = LtsConfig(
    image=TimmBackbone(name="darknet53"), text=SMALL_TEXT, segment=LtsSegmentConfig(width=8)
)
METHODS: dict[str, ModelConfig] = {
    "coupalign, Swin": COUPALIGN,
    "lavt, ResNet": LAVT,
    "vlt": VLT,
    "lts, Darknet": LTS,
}


def draw_batch(samples: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    target = torch.zeros(samples, SIZE, SIZE, dtype=torch.bool)
    target[:, 10:40, 20:50] = True
    word_mask = torch.ones(samples, 7, dtype=torch.bool)
    word_mask[0, 5:] = False
    image = torch.randint(0, 256, (samples, 3, SIZE, SIZE), dtype=torch.uint8)
    words = torch.randint(VOCABULARY, (samples, 7))
    return image, words, word_mask, target


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    batch = draw_batch()
    torch.manual_seed(2)  # for dropout
    loss = model(*batch)["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", METHODS)
def test_compiled_methods_have_no_graph_break_and_eager_numbers(name: str) -> None:
    torch.manual_seed(0)
    plain = build_model(METHODS[name], VOCABULARY, SIZE).train()
    compiled = build_model(METHODS[name], VOCABULARY, SIZE).train()
    compiled.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("aot_eager")

    regions = compile_regions(compiled, backend=counter)
    expected_loss, expected = loss_and_gradients(plain)
    loss, gradients = loss_and_gradients(compiled)

    # The numbers are those of the eager model.
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            gradients[parameter], gradient, atol=1e-4 * scale, rtol=1e-3, msg=parameter
        )
    assert plain.state_dict().keys() == compiled.state_dict().keys()

    # The second step compiles nothing, and neither does scoring with another batch size.
    assert 0 < counter.frame_count <= regions
    loss_and_gradients(compiled)
    assert counter.frame_count <= regions, "the second step compiled again"
    with torch.no_grad():
        before = counter.frame_count
        compiled.eval()(*draw_batch(3)[:3])
        assert counter.frame_count == before, "scoring compiled"


def test_blocks_of_equal_shape_are_compiled_once() -> None:
    """Swin-T has 12 blocks. Four stages, shifted or not, give eight variants.

    The first block drops nothing, which gives one more.
    """
    config = TimmBackbone(name="swin_tiny_patch4_window7_224", drop_path=0.3)
    backbone = StagedBackbone(config, 224).train()
    model = build_model(COUPALIGN, VOCABULARY, SIZE)
    model.image = backbone
    blocks = [block for block in backbone.blocks() if "Block" in type(block).__name__]
    model.regions = lambda: blocks
    counter = CompileCounterWithBackend("eager")

    assert compile_regions(model, backend=counter) == 12
    x = torch.rand(2, 224, 224, 3)
    for stage in range(4):
        x = backbone(stage, x)

    assert counter.frame_count <= 9
    assert sum(isinstance(module, DropPath) for module in backbone.modules()) == 22


_TRAIN = """
import json, torch
from coupalign.model.build import build_model
from coupalign.model.compile import compile_regions, compile_seconds, describe_compilation
from tests.unit.model.test_compile import SIZE, VLT, VOCABULARY, loss_and_gradients

torch.manual_seed(0)
model = build_model(VLT, VOCABULARY, SIZE).train()
model.regions = lambda: [model.balance]
compile_regions(model)
loss, _ = loss_and_gradients(model)
text = describe_compilation()
print(json.dumps({"loss": loss, "description": text, "seconds": compile_seconds()}))
"""


def _train_in_new_process(cache: Path) -> dict:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_compiled_code_is_read_from_the_cache_by_the_next_process(tmp_path: Path) -> None:
    first = _train_in_new_process(tmp_path)
    second = _train_in_new_process(tmp_path)

    folder = tmp_path / "coupalign" / "compiled"
    assert folder.is_dir()
    assert first["loss"] == second["loss"] and first["seconds"] > 0
    assert f" 0 from the cache in {folder}" in first["description"]
    assert " 0 new graphs" not in first["description"]
    assert ": 0 new graphs" in second["description"]
    assert " 0 from the cache" not in second["description"]
