"""CUDA graphs around a step: what can be recorded, and sums of outputs that share their memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
from tests.distributed.jobs import SIZE, VOCABULARY, tiny, train_each
from tests.distributed.ranks import run_ranks
from tests.unit.model.test_compile import METHODS, draw_batch

ON_GPU = torch.cuda.is_available()
DROPOUT = ("model.text.dropout=0.2",)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
@pytest.mark.parametrize("changes", [(), ("precision=bf16",), ("compile=true",)], ids=str)
def test_recorded_step_equals_an_eager_one(changes: tuple[str, ...]) -> None:
    eager = tiny(*DROPOUT, *changes, "cuda_graphs=false")
    recorded = tiny(*DROPOUT, *changes, "cuda_graphs=true")

    [expected] = run_ranks(train_each, 1, [eager], 5, gpu=True)[0]
    [result] = run_ranks(train_each, 1, [recorded], 5, gpu=True)[0]

    assert result["numbers"] == pytest.approx(expected["numbers"], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_step_whose_outputs_overwrite_each_other_is_the_same(ranks: int) -> None:
    """With accumulation, dropout, clipping, moving average and scoring; two ranks have buckets."""
    config = tiny(*DROPOUT, "train.global_batch=12")
    recorded = config.model_copy(update={"cuda_graphs": True})

    [expected] = run_ranks(train_each, ranks, [config], 4)[0]
    [result] = run_ranks(train_each_with_replay, ranks, [recorded], 4)[0]

    assert result["numbers"] == expected["numbers"]
    for kind in ("weights", "ema"):
        for name, value in expected[kind].items():
            assert torch.equal(result[kind][name], value), name
    assert torch.equal(result["logits"], expected["logits"])


def test_cuda_graphs_are_refused_where_nothing_can_be_recorded() -> None:
    without_gpu = "cuda_graphs.* NVIDIA GPU.* on the cpu: set cuda_graphs: false"
    with pytest.raises(InputError, match=without_gpu):
        jobs.make_engine(tiny("cuda_graphs=true"), World(0, 1, 0, 1, torch.device("cpu")))

    with_deepspeed = "cuda_graphs cannot .* DeepSpeed, which moves.* Set engine.kind to ddp"
    with pytest.raises(InputError, match=with_deepspeed):
        tiny("cuda_graphs=true", "engine.kind=deepspeed")

    recomputing = "cuda_graphs cannot record checkpointing.* Set model.image.checkpointing"
    with pytest.raises(InputError, match=recomputing):
        tiny("cuda_graphs=true", "model.text.checkpointing=true")


@pytest.mark.parametrize("name", METHODS)
def test_no_method_makes_or_reads_a_host_tensor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as anything on the CPU there would be copied to a GPU within a step."""
    autocast = torch.autocast

    def autocast_except_meta(device: str, **options: Any) -> AbstractContextManager:
        return nullcontext() if device == "meta" else autocast(device, **options)

    monkeypatch.setattr(torch, "autocast", autocast_except_meta)
    with torch.device("meta"):
        model = build_model(METHODS[name], VOCABULARY, SIZE).train()
        inputs = [torch.empty_like(tensor, device="meta") for tensor in draw_batch()]

    with HostTensors() as host:
        model(*inputs)["loss"].backward()
    assert host.operators == []

    # The check itself works.
    with HostTensors() as host:
        inputs[0].to(torch.float32) * torch.tensor(2.0)
    assert host.operators


class HostTensors(TorchDispatchMode):
    """Name the operators that read or return a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.operators.append(str(func))
        return out


def train_each_with_replay(
    world: World, configs: Sequence[Config], steps: int
) -> list[dict[str, Any]]:
    """`train_each` where `replay` stands in for CUDA graphs; in a process of its own."""
    torch.cuda.make_graphed_callables = replay
    jobs.make_engine = make_ddp
    return train_each(world, configs, steps)


def make_ddp(config: Config, world: World) -> Ddp:
    """`make_engine` without the check for a GPU."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, VOCABULARY, SIZE).to(world.device)
    return Ddp(model, build_optimizer(model, config.optim), config, world)


def replay(net: nn.Module, inputs: tuple[Tensor, ...], allow_unused_input: bool) -> None:
    """Do to memory what `torch.cuda.make_graphed_callables` does, without a GPU.

    Inputs are copied to one place. The losses and gradients of each call overwrite those of the
    call before.
    """
    run, parameters = net.forward, tuple(net.parameters())
    losses = {name: value.detach() for name, value in run(*inputs).items()}
    gradients: list[Tensor | None] = []
    live: dict[str, Tensor] = {}

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
            for static, tensor in zip(inputs, given):
                static.copy_(tensor)
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
            for static, value in zip(gradients, new):
                if static is not None:
                    static.copy_(value)

            no_input_gradients = [None] * len(inputs)
            return (
                *no_input_gradients,
                *(None if value is None else value.detach() for value in gradients),
            )

    def replayed(*given: Tensor) -> Any:
        if not net.training:
            return run(*given)
        return dict(zip(losses, Replay.apply(*given, *parameters)))

    net.forward = replayed
