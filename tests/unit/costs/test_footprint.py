"""The footprint of a micro-batch against autograd's own account of it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.config.schema import Config
from coupalign.costs.footprint import Footprint, LiveMemory, count_step, footprint, on_gpu_rules
from coupalign.engine.base import DTYPES
from coupalign.model.build import build_model
from tests.distributed.jobs import SIZE, VOCABULARY, tiny


def model_of(config: Config) -> nn.Module:
    with torch.device("meta"):
        return build_model(config.model, VOCABULARY, SIZE).train()


def footprint_of(*overrides: str) -> Footprint:
    config = tiny(*overrides)
    return footprint(model_of(config), config)


def saved_by_autograd(config: Config, images: int) -> int:
    """Return the bytes that are saved for backward and still alive after forward.

    Memory that several tensors share counts once; parameters and inputs do not count.
    """
    model, words = model_of(config), config.data.max_tokens
    saved: dict[int, tuple[weakref.ref, int]] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inputs = (
            torch.zeros(images, 3, SIZE, SIZE, dtype=torch.uint8),
            torch.zeros(images, words, dtype=torch.int64),
            torch.ones(images, words, dtype=torch.bool),
            torch.ones(images, SIZE, SIZE, dtype=torch.bool),
        )
        not_counted = {
            x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers(), *inputs)
        }
        hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
        with on_gpu_rules(), hooks:
            loss = model(*inputs)["loss"]

        # The graph that holds the saved tensors must live until they are counted.
        assert loss.requires_grad
        return sum(
            size
            for storage, (alive, size) in saved.items()
            if alive() is not None and storage not in not_counted
        )


def test_saved_bytes_are_those_that_autograd_saves() -> None:
    """Otherwise, only scalars are alive when the forward pass ends: the losses."""
    config = tiny("model.text.dropout=0.1")

    cost = footprint(model_of(config), config)

    assert cost.saved.at(1) == pytest.approx(saved_by_autograd(config, 1), rel=0.01)
    assert cost.saved.at(5) == pytest.approx(saved_by_autograd(config, 5), rel=0.01)


@pytest.mark.parametrize("precision", DTYPES)
def test_lines_predict_other_batch_sizes(precision: str) -> None:
    config = tiny(f"precision={precision}")
    cost = footprint(model_of(config), config)

    model = model_of(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        saved, peak, flops = count_step(model, config, 7)

    assert cost.saved.at(7) == pytest.approx(saved, rel=1e-3)
    assert cost.flops.at(7) == pytest.approx(flops)
    assert cost.peak.at(7) == pytest.approx(peak, rel=0.01), "the peak may be at another operator"
    assert saved <= peak


def test_half_precision_saves_memory() -> None:
    full, half = footprint_of(), footprint_of("precision=bf16")

    assert half.saved.slope < full.saved.slope
    assert half.flops.slope == full.flops.slope


def test_checkpointing_trades_flops_for_memory() -> None:
    full = footprint_of()
    whole = footprint_of("model.image.checkpointing=true", "model.text.checkpointing=true")
    selective = footprint_of(
        "model.image.checkpointing=selective", "model.text.checkpointing=selective"
    )

    assert whole.saved.slope < selective.saved.slope < full.saved.slope
    assert whole.flops.slope > full.flops.slope, "what is dropped is computed again"
    assert selective.flops.slope == full.flops.slope, "products are kept"


def test_freed_and_shared_memory_counts_once() -> None:
    with LiveMemory() as alive:
        # Views share the memory of their base.
        x = torch.empty(1000)
        y = x[10:].view(3, 330)
        assert alive.now == 4000

        # A temporary tensor counts for the peak only.
        z = x + 1
        del z
        assert (alive.now, alive.peak) == (4000, 8000)

        # A view keeps the memory of its base alive.
        del x
        assert alive.now == 4000
        del y
        assert alive.now == 0
