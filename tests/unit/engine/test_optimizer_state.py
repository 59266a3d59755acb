"""Adam's state of whole parameters, written by one optimizer and loaded into another."""

from __future__ import annotations

from pathlib import Path

import torch

from coupalign.engine.optimizer_state import (
    load_whole_state,
    open_optimizer_state,
    write_whole_state,
)


def make_model() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def test_whole_state_survives_a_round_trip(tmp_path: Path) -> None:
    model, optimizer = make_model()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    write_whole_state(tmp_path, model, optimizer)

    other_model, other_optimizer = make_model()
    load_whole_state(open_optimizer_state(tmp_path), other_model, other_optimizer, steps=1)

    for parameter, other in zip(model.parameters(), other_model.parameters()):
        state, other_state = optimizer.state[parameter], other_optimizer.state[other]
        assert state.keys() == other_state.keys()
        for name, value in state.items():
            assert torch.equal(value, other_state[name]), name


def test_parameter_without_a_gradient_has_no_state(tmp_path: Path) -> None:
    model, optimizer = make_model()
    write_whole_state(tmp_path, model, optimizer)

    assert open_optimizer_state(tmp_path)("weight") is None
