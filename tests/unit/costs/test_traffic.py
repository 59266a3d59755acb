"""Bytes and FLOPs of single operators against their definition, and the step of a small model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.costs.traffic import Traffic, one_operator_attention, step_traffic, traffic_table
from tests.distributed.jobs import tiny

A = torch.randn(8, 16)
B = torch.randn(16, 4)
ROW = torch.randn(1, 16)

# What runs, its bytes and its FLOPs.
OPERATORS: dict[str, tuple[Callable[[], Tensor], int, int]] = {
    "a product reads both operands": (lambda: A @ B, 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4),
    "a sum of the same tensor reads it once": (lambda: A + A, 4 * 2 * 8 * 16, 0),
    "in place is read and written": (lambda: A.add_(0.0), 4 * 2 * 8 * 16, 0),
    "a view is free": (lambda: A.t()[1:].unsqueeze(0).detach(), 0, 0),
    "an expanded tensor is as large as its memory": (
        lambda: A + ROW.expand(8, 16),
        4 * (2 * 8 * 16 + 16),
        0,
    ),
    "an allocation is free": (lambda: torch.empty(100), 0, 0),
    "a fill is written": (lambda: torch.zeros(100), 400, 0),
}


@pytest.mark.parametrize("what", OPERATORS)
def test_operator_moves_bytes_and_counts_flops(what: str) -> None:
    run, size, flops = OPERATORS[what]

    with Traffic() as traffic:
        run()

    assert (traffic.total.bytes, traffic.total.flops) == (size, flops)


def test_attention_stays_one_operator_in_both_directions() -> None:
    original = F.scaled_dot_product_attention

    with FakeTensorMode(), one_operator_attention(), Traffic() as traffic:
        q = torch.randn(2, 3, 50, 8, requires_grad=True)
        k = torch.randn(2, 3, 7, 8, requires_grad=True)
        v = torch.randn(2, 3, 7, 8, requires_grad=True)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(50, 7))
        output.sum().backward()

    # Two products forward, five backward.
    product = 2 * 2 * 3 * 50 * 7 * 8
    assert traffic.total.flops == 7 * product

    # Forward reads q, k, v and writes an output like q; backward reads and writes all of them.
    q_bytes, k_bytes = 4 * q.numel(), 4 * k.numel()
    assert traffic.total.bytes >= 2 * q_bytes + 2 * k_bytes + 4 * q_bytes + 4 * k_bytes
    assert F.scaled_dot_product_attention is original


def test_step_counts_every_part_of_the_model() -> None:
    costs = step_traffic(tiny(), 4)

    assert list(costs)[:3] == ["image", "text", "wpa"]
    assert all(cost.bytes > 0 for cost in costs.values())
    assert all(costs[name].flops > 0 for name in costs if name != "rest")

    twice_as_many = step_traffic(tiny(), 8)
    assert 1.5 < twice_as_many["wpa"].bytes / costs["wpa"].bytes <= 2


def test_table_shows_the_total_and_how_it_was_counted() -> None:
    table = traffic_table(step_traffic(tiny(), 4), 4)

    assert "counted, not measured" in table
    assert "total" in table
    assert "100.0%" in table
