"""CUDA graphs around a step: what may be recorded, and that results which always lie in the same memory are summed as others are."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coupalign.config.schema import Config
from coupalign.distributed.world import World
from coupalign.engine.ddp import Ddp
from coupalign.engine.optimizer import build_optimizer
from coupalign.errors import InputError
from coupalign.model.build import build_model
from tests.distributed import jobs
from tests.distributed.jobs import SIZE, VOCABULARY, curves, tiny
from tests.distributed.ranks import run_ranks
from tests.unit.model.test_compile import METHODS, batch

ON_GPU = torch.cuda.is_available()
DROPPING = ("model.text.dropout=0.2",)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
@pytest.mark.parametrize("changes", [(), ("precision=bf16",), ("compile=true",)], ids=str)
def test_a_recorded_step_computes_what_an_eager_one_does(changes: tuple[str, ...]) -> None:
    plain, recorded = (
        tiny(*DROPPING, *changes, f"cuda_graphs={value}") for value in ("false", "true")
    )
    [[expected], [found]] = [
        run_ranks(curves, 1, [config], 5, gpu=True)[0] for config in (plain, recorded)
    ]
    assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_results_that_overwrite_each_other_is_the_same(ranks: int) -> None:
    """Accumulation, dropout, clipping, a moving average, scoring in between; one rank and the buckets of DDP."""
    config = tiny(*DROPPING, "train.global_batch=12")
    [expected] = run_ranks(curves, ranks, [config], 4)[0]
    [found] = run_ranks(
        curves_played_back, ranks, [config.model_copy(update={"cuda_graphs": True})], 4
    )[0]
    assert found["numbers"] == expected["numbers"]
    for kind in ("weights", "ema"):
        assert all(torch.equal(found[kind][name], value) for name, value in expected[kind].items())
    assert torch.equal(found["logits"], expected["logits"])


def test_it_is_refused_where_nothing_can_be_recorded() -> None:
    with pytest.raises(
        InputError, match="cuda_graphs.* NVIDIA GPU.* on the cpu: set cuda_graphs: false"
    ):
        jobs.make_engine(tiny("cuda_graphs=true"), World(0, 1, 0, 1, torch.device("cpu")))
    with pytest.raises(InputError, match="DeepSpeed moves them: set engine.kind to ddp"):
        tiny("cuda_graphs=true", "engine.kind=deepspeed")
    with pytest.raises(
        InputError, match="cuda_graphs cannot record checkpointing.* set model.image.checkpointing"
    ):
        tiny("cuda_graphs=true", "model.text.checkpointing=true")


@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_or_reads_a_tensor_of_the_host(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be recorded, asked of the meta device: whatever lies on the CPU there would be copied to a GPU in the middle of a step."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda device, **more: nullcontext() if device == "meta" else autocast(device, **more),
    )
    with torch.device("meta"):
        model = build_model(METHODS[name], VOCABULARY, SIZE).train()
        inputs = [torch.empty_like(tensor, device="meta") for tensor in batch()]
    with HostTensors() as found:
        model(*inputs)["loss"].backward()
    assert found.operators == []
    with HostTensors() as found:
        inputs[0].to(torch.float32) * torch.tensor(2.0)
    assert found.operators, "this is how one would have been seen"


class HostTensors(TorchDispatchMode):
    """Names the operators that read or give a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(
            isinstance(leaf, Tensor) and leaf.device.type == "cpu"
            for leaf in tree_leaves((args, kwargs, out))
        ):
            self.operators.append(str(func))
        return out


def curves_played_back(world: World, configs: Sequence[Config], count: int) -> list[dict[str, Any]]:
    """`curves`, where a recorded step is one of `play_back`; in a process of its own."""
    torch.cuda.make_graphed_callables = play_back
    jobs.make_engine = make_on_any_device
    return curves(world, configs, count)


def make_on_any_device(config: Config, world: World) -> Ddp:
    torch.manual_seed(config.seed)
    model = build_model(config.model, VOCABULARY, SIZE).to(world.device)
    return Ddp(model, build_optimizer(model, config.optim), config, world)


def play_back(net: nn.Module, inputs: tuple[Tensor, ...], allow_unused_input: bool) -> None:
    """What `torch.cuda.make_graphed_callables` does to memory, without a GPU: inputs are copied to one place, and losses and gradients
    of every call lie where those of the call before lay."""
    run, parameters = net.forward, tuple(net.parameters())
    losses = {name: value.detach() for name, value in run(*inputs).items()}
    gradients: list[Tensor | None] = []
    live: dict[str, Tensor] = {}

    class Playback(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
            for place, tensor in zip(inputs, given):
                place.copy_(tensor)
            with torch.enable_grad():
                live.update(run(*inputs))
            for name, value in live.items():
                losses[name].copy_(value.detach())
            return tuple(value.detach() for value in losses.values())

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            [grad] = [grad for name, grad in zip(losses, grads) if name == "loss"]
            new = torch.autograd.grad(
                live["loss"], parameters, grad, allow_unused=allow_unused_input
            )
            if not gradients:
                gradients.extend(
                    None if value is None else torch.empty_like(value) for value in new
                )
            for place, value in zip(gradients, new):
                if place is not None:
                    place.copy_(value)
            return (
                *[None] * len(inputs),
                *[None if value is None else value.detach() for value in gradients],
            )

    def played(*given: Tensor) -> Any:
        return (
            dict(zip(losses, Playback.apply(*given, *parameters))) if net.training else run(*given)
        )

    net.forward = played
