"""Bytes and FLOPs of single operators against their definition, and the whole step of a small model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.costs.traffic import Traffic, one_operator_attention, step_traffic, traffic_table
from tests.distributed.jobs import tiny

A, B = (torch.randn(8, 16), torch.randn(16, 4))
ROW = torch.randn(1, 16)
OPERATORS = {  # what runs, bytes, FLOPs
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
def test_an_operator(what: str) -> None:
    run, size, flops = OPERATORS[what]
    with Traffic() as traffic:
        run()
    assert (traffic.total.bytes, traffic.total.flops) == (size, flops)


def test_attention_stays_one_operator_in_both_directions() -> None:
    original = F.scaled_dot_product_attention
    with FakeTensorMode(), one_operator_attention(), Traffic() as traffic:
        q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (50, 7, 7))
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(50, 7)).sum().backward()
    names = {"q": 2 * 3 * 50 * 8, "k": 2 * 3 * 7 * 8}
    products = 2 * 2 * 3 * 50 * 7 * 8
    assert traffic.total.flops == 7 * products
    assert traffic.total.bytes >= 4 * (
        2 * names["q"] + 2 * names["k"] + 4 * names["q"] + 4 * names["k"]
    )
    assert F.scaled_dot_product_attention is original


def test_a_step_has_all_its_parts() -> None:
    costs = step_traffic(tiny(), 4)
    assert all(cost.bytes > 0 for cost in costs.values()) and list(costs)[:3] == [
        "image",
        "text",
        "wpa",
    ]
    assert all(costs[name].flops > 0 for name in costs if name != "rest")
    twice = step_traffic(tiny(), 8)
    assert 1.5 < twice["wpa"].bytes / costs["wpa"].bytes <= 2
    shown = traffic_table(costs, 4)
    assert "counted, not measured" in shown and "total" in shown and "100.0%" in shown
