"""Compiling by region: no graph break in any method, the numbers of the eager model, few variants, a cache that outlives the process."""

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
    EncodersConfig,
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
ENCODERS = EncodersConfig(
    image=SmallBackbone(widths=(8, 8, 16, 16)), text=SmallText(width=16, heads=2, dropout=0.1)
)
SWIN = TimmBackbone(name="swin_tiny_patch4_window7_224", drop_path=0.2)


COUPALIGN = CoupAlignConfig(
    image=SWIN,
    text=ENCODERS.text,
    decoder=DecoderConfig(width=16, depth=2),
    refine=RefineConfig(points=8),
    proposals=ProposalsConfig(count=4, layers=2, heads=2, ffn=32, stages=(3, 4)),
)
METHODS: dict[str, ModelConfig] = {
    "coupalign, Swin": COUPALIGN,
    "lavt, ResNet": LavtConfig(
        image=TimmBackbone(name="resnet101"), text=ENCODERS.text, decoder=WideDecoderConfig(width=8)
    ),
    "vlt": VltConfig(
        image=ENCODERS.image,
        text=ENCODERS.text,
        transformer=VltTransformerConfig(
            count=4, width=16, encoder_layers=2, decoder_layers=1, heads=2, ffn=32
        ),
    ),
    "lts, Darknet": LtsConfig(
        image=TimmBackbone(name="darknet53"), text=ENCODERS.text, segment=LtsSegmentConfig(width=8)
    ),
}


def batch(samples: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    target = torch.zeros(samples, SIZE, SIZE, dtype=torch.bool)
    target[:, 10:40, 20:50] = True
    word_mask = torch.ones(samples, 7, dtype=torch.bool)
    word_mask[0, 5:] = False
    return (
        torch.randint(0, 256, (samples, 3, SIZE, SIZE), dtype=torch.uint8),
        torch.randint(VOCABULARY, (samples, 7)),
        word_mask,
        target,
    )


def loss_and_gradients(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(2)  # of what is dropped
    loss = model(*batch())["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", METHODS)
def test_no_method_breaks_a_graph_and_none_changes_a_number(name: str) -> None:
    torch.manual_seed(0)
    plain = build_model(METHODS[name], VOCABULARY, SIZE).train()
    compiled = build_model(METHODS[name], VOCABULARY, SIZE).train()
    compiled.load_state_dict(plain.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    regions = compile_regions(compiled, backend=counter)
    (loss, wanted), (found_loss, found) = loss_and_gradients(plain), loss_and_gradients(compiled)
    assert found_loss == pytest.approx(loss, rel=1e-5) and wanted.keys() == found.keys()
    scale = max(gradient.abs().max().item() for gradient in wanted.values())
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(
            found[parameter], gradient, atol=1e-4 * scale, rtol=1e-3, msg=parameter
        )
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert 0 < counter.frame_count <= regions
    loss_and_gradients(compiled)
    assert counter.frame_count <= regions, "the second step compiled again"
    with torch.no_grad():
        before = counter.frame_count
        compiled.eval()(*batch(3)[:3])
        assert counter.frame_count == before, (
            "scoring runs as it is written, whatever the size of its batch"
        )


def test_blocks_of_one_shape_are_compiled_once() -> None:
    """Swin-T has 12 blocks; four stages, shifted or not, make eight, and the first, which drops nothing, is one of its own."""
    backbone = StagedBackbone(
        TimmBackbone(name="swin_tiny_patch4_window7_224", drop_path=0.3), 224
    ).train()
    model = build_model(COUPALIGN, VOCABULARY, SIZE)
    model.image = backbone
    counter = CompileCounterWithBackend("eager")
    model.regions = lambda: [
        block for block in backbone.blocks() if "Block" in type(block).__name__
    ]
    assert compile_regions(model, backend=counter) == 12
    x = torch.rand(2, 224, 224, 3)
    for stage in range(4):
        x = backbone(stage, x)
    assert counter.frame_count <= 9
    assert sum(isinstance(module, DropPath) for module in backbone.modules()) == 22


def test_what_is_dropped_is_dropped_by_sample_and_what_stays_is_scaled() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3, 2)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out, out[:, :1, :1].expand_as(out)) and out.mean().item() == pytest.approx(
        1, abs=0.03
    )
    assert drop.eval()(x) is x


_TRAIN = """
import json, sys, torch
from tests.unit.model.test_compiled import METHODS, SIZE, VOCABULARY, loss_and_gradients
from coupalign.model.compile import compile_regions
from coupalign.model.compile import compile_seconds
from coupalign.model.compile import explain_compilation
from coupalign.model.build import build_model

torch.manual_seed(0)
model = build_model(METHODS["vlt"], VOCABULARY, SIZE).train()
model.regions = lambda: [model.balance]
compile_regions(model)
loss, _ = loss_and_gradients(model)
print(json.dumps({"loss": loss, "words": explain_compilation(), "seconds": compile_seconds()}))
"""


@pytest.mark.slow
def test_what_was_compiled_outlives_the_process(tmp_path: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"
    }
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", _TRAIN],
                env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[3],
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    assert first["loss"] == second["loss"] and first["seconds"] > 0
    folder = tmp_path / "coupalign" / "compiled"
    assert (
        folder.is_dir()
        and f"0 taken from {folder}" in first["words"]
        and " 0 graphs anew" not in first["words"]
    )
    assert ": 0 graphs anew" in second["words"] and "0 taken from" not in second["words"]
