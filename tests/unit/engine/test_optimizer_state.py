"""Adam's state of whole parameters, written by one optimizer and loaded into another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.engine.optimizer_state import (
    load_whole_state,
    open_optimizer_state,
    write_whole_state,
)
from coupalign.errors import InputError
from tests.hostile import FORMS, RunsCode, write_pickle


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


@pytest.mark.parametrize("form", FORMS)
def test_optimizer_state_that_runs_code_is_refused(tmp_path: Path, form: str) -> None:
    marker = tmp_path / "ran"
    write_pickle(tmp_path / "optimizer.pt", {"w": RunsCode(marker)}, form)

    with pytest.raises(InputError, match=r"optimizer\.pt: cannot be read as optimizer state"):
        open_optimizer_state(tmp_path)

    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_universal_state_that_runs_code_is_refused(tmp_path: Path, form: str) -> None:
    marker, folder = tmp_path / "ran", tmp_path / "universal" / "zero" / "model.weight"
    folder.mkdir(parents=True)
    for moment in ("exp_avg", "exp_avg_sq"):
        write_pickle(folder / f"{moment}.pt", {"param": RunsCode(marker)}, form)

    with pytest.raises(InputError, match=r"exp_avg\.pt: cannot be read as optimizer state"):
        open_optimizer_state(tmp_path)("weight")

    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        torch.zeros(3),
        {"weight": torch.zeros(3)},
        {"weight": {"exp_avg": torch.zeros(3)}},
        {"weight": {"exp_avg": torch.zeros(3), "exp_avg_sq": 0.0}},
        {"weight": {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3).long()}},
    ],
)
def test_optimizer_state_of_another_form_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "optimizer.pt")

    with pytest.raises(InputError, match=r"optimizer\.pt: cannot be read as optimizer state"):
        open_optimizer_state(tmp_path)


def test_checkpoint_without_optimizer_state_is_refused(tmp_path: Path) -> None:
    """Moments of zero would change the run without a word."""
    with pytest.raises(InputError, match=r"neither optimizer\.pt nor universal/zero"):
        open_optimizer_state(tmp_path)


def test_universal_state_with_half_of_its_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "universal" / "zero" / "model.weight"
    folder.mkdir(parents=True)
    torch.save({"param": torch.zeros(3)}, folder / "exp_avg.pt")

    with pytest.raises(InputError, match=r"exp_avg_sq\.pt"):
        open_optimizer_state(tmp_path)("weight")


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (5,), ()])
def test_moments_of_another_model_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model, optimizer = make_model()
    moments = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}

    with pytest.raises(InputError, match="the optimizer state of weight has the shape"):
        load_whole_state({"weight": moments}.get, model, optimizer, steps=1)
