"""The footprint of a micro-batch against autograd's own account of it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.config.schema import Config
from coupalign.costs.footprint import LiveMemory, count_step, footprint, on_gpu_rules
from coupalign.engine.base import DTYPES
from coupalign.model.build import build_model
from tests.distributed.jobs import SIZE, VOCABULARY, tiny


def model_of(config: Config) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(config.model, VOCABULARY, SIZE).train()


def saved_by_autograd(config: Config, images: int) -> int:
    """Bytes of the memory that is packed for backward and still there, once each, without parameters and input."""
    model, words = model_of(config), config.data.max_tokens
    packed: dict[int, tuple[weakref.ref, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        packed[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inputs = (
            torch.zeros(images, 3, SIZE, SIZE, dtype=torch.uint8),
            torch.zeros(images, words, dtype=torch.int64),
            torch.ones(images, words, dtype=torch.bool),
            torch.ones(images, SIZE, SIZE, dtype=torch.bool),
        )
        known = {
            x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers(), *inputs)
        }
        with on_gpu_rules(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*inputs)["loss"]
        assert loss.requires_grad
        return sum(
            size
            for place, (alive, size) in packed.items()
            if alive() is not None and place not in known
        )


def test_what_is_saved_is_what_autograd_packs() -> None:
    """Alive when the forward pass ends are besides only scalars: the losses."""
    config = tiny("model.text.dropout=0.1")
    found = footprint(model_of(config), config)
    for images in (1, 5):
        assert found.saved.at(images) == pytest.approx(saved_by_autograd(config, images), rel=0.01)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_lines_hold_for_other_sizes(precision: str) -> None:
    config = tiny(f"precision={precision}")
    found = footprint(model_of(config), config)
    model = model_of(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        saved, peak, flops = count_step(model, config, 7)
    assert (found.saved.at(7), found.flops.at(7)) == (
        pytest.approx(saved, rel=1e-3),
        pytest.approx(flops),
    )
    assert found.peak.at(7) == pytest.approx(peak, rel=0.01), "the place of the peak may change"
    assert saved <= peak


def test_half_precision_saves_memory_and_checkpointing_too() -> None:
    full, half, again, some = (
        footprint(model_of(config), config)
        for config in (
            tiny(),
            tiny("precision=bf16"),
            *(
                tiny(f"model.image.checkpointing={how}", f"model.text.checkpointing={how}")
                for how in ("true", "selective")
            ),
        )
    )
    assert half.saved.slope < full.saved.slope and again.saved.slope < full.saved.slope
    assert again.flops.slope > full.flops.slope == half.flops.slope, (
        "what is thrown away is computed again"
    )
    assert (
        again.saved.slope < some.saved.slope < full.saved.slope
        and some.flops.slope == full.flops.slope
    ), "products are kept"


def test_memory_that_is_freed_or_shared_counts_once() -> None:
    with LiveMemory() as alive:
        x = torch.empty(1000)
        y = x[10:].view(3, 330)
        assert alive.now == 4000
        z = x + 1
        del z
        assert (alive.now, alive.peak) == (4000, 8000)
        del x
        assert alive.now == 4000, "a view keeps the memory"
        del y
        assert alive.now == 0
