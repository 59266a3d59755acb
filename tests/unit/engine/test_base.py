"""What the engines share: loss scale, phases, statistics of a step, bytes held."""

from __future__ import annotations

import math

import torch

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.distributed.world import World
from coupalign.engine.base import (
    EngineBase,
    LossScale,
    Phases,
    StepStats,
    backward_loss,
    held_bytes,
    preserved_buffers,
    seed_step,
)

YES, NO = torch.tensor(True), torch.tensor(False)


def test_loss_scale_of_fp16_halves_on_overflow_and_doubles_after_2000_good_steps() -> None:
    scale = LossScale("fp16")

    scale.update(NO)
    assert (scale.scale, scale.good_steps) == (32768.0, 0)

    for _ in range(2000):
        scale.update(YES)
    assert scale.scale == 65536.0
    assert int(scale.applied_steps) == 2000


def test_parameter_without_a_gradient_is_no_obstacle_to_unscaling() -> None:
    """fp16 divides all gradients by the loss scale, and an unused parameter has none."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False) for _ in range(2)])
    config = override(Config(), ["precision=fp16", "optim.clip_norm=null"])
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    engine = EngineBase(model, torch.optim.AdamW(model.parameters()), config, alone)
    scale = engine.loss_scale.scale

    (model[0](torch.tensor([[3.0, 4.0]])).sum() * scale).backward()
    norm = engine._clip_gradients()

    assert scale > 1 and norm.item() == 5.0
    assert model[0].weight.grad.tolist() == [[3.0, 4.0]] and model[1].weight.grad is None


def test_loss_scale_is_constant_without_fp16_and_counts_applied_steps() -> None:
    scale = LossScale("bf16")

    for applied in (YES, NO, YES):
        scale.update(applied)

    assert scale.state() == {"applied": 2, "scale": 1.0, "good_steps": 0}


def test_step_stats_names_the_ranks_whose_loss_is_not_finite() -> None:
    means = torch.tensor([[1.0, 2.0], [math.nan, 4.0]], dtype=torch.float64)

    stats = StepStats(("loss", "mask"), means, norm=torch.tensor(math.nan))

    assert stats.bad_ranks == (1,)
    assert not stats.applied and math.isnan(stats.grad_norm)
    assert stats.losses["mask"] == 3.0


def test_backward_loss_turns_infinity_into_nan_gradients() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)

    backward_loss({"loss": weight.sum() * math.inf}).backward()

    assert weight.grad.isnan().all()


def test_phases_add_up_by_name_until_read() -> None:
    phases = Phases(torch.device("cpu"))
    for name in ("forward", "backward", "forward"):
        with phases(name):
            pass

    seconds = phases.read()

    assert seconds.keys() == {"forward", "backward"} and min(seconds.values()) >= 0
    assert phases.read() == {}


def test_preserved_buffers_makes_norms_forget() -> None:
    net = torch.nn.BatchNorm1d(2)

    with preserved_buffers(net), torch.no_grad():
        net(torch.randn(8, 2) + 5)

    assert net.running_mean.tolist() == [0, 0] and int(net.num_batches_tracked) == 0


def test_held_bytes_counts_shared_memory_once() -> None:
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    averages = [p.detach().clone() for p in model.parameters()]

    held = held_bytes(model, optimizer, averages)

    size = 4 * 2 * 4
    step_counter = 4
    assert held == {"weights": size, "optimizer": 2 * size + step_counter, "average": size}


def test_seed_step_depends_on_seed_step_and_rank() -> None:
    def draw(*key: int) -> float:
        seed_step(*key)
        return torch.rand(()).item()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]

    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, 1, 0) == draw(0, 1, 0)
