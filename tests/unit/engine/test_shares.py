"""DeepSpeed's files are read without running code, whatever DeepSpeed asks torch for."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from coupalign.engine.shares import check_shares, restricted_loading
from coupalign.errors import InputError
from tests.hostile import FORMS, RunsCode, write_pickle

VARIABLES = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


@pytest.mark.parametrize("form", FORMS)
def test_share_that_runs_code_is_refused_by_both_barriers(tmp_path: Path, form: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "mp_rank_00_model_states.pt"
    write_pickle(file, {"module": {"w": torch.zeros(3)}, "note": RunsCode(marker)}, form)

    with pytest.raises(InputError, match="mp_rank_00_model_states.pt"):
        check_shares(tmp_path)
    with restricted_loading(), pytest.raises((pickle.UnpicklingError, RuntimeError)):
        torch.load(file, weights_only=False)

    assert not marker.exists()


def test_foreign_names_are_listed(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", RunsCode(tmp_path / "ran"))

    with pytest.raises(InputError, match=r"a\.pt: holds 'posix.system', which DeepSpeed does not"):
        check_shares(tmp_path)


def test_torn_share_is_refused_by_name(tmp_path: Path) -> None:
    write_pickle(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])

    with pytest.raises(InputError, match=r"a\.pt: not a file that DeepSpeed wrote \("):
        check_shares(tmp_path)


def test_classes_that_deepspeed_stores_are_read(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    stored = {
        "stage": ZeroStageEnum(3),
        "place": fragment_address(numel=3, start=4),
        "scaler": LossScaler(2.0),
        "w": torch.arange(3),
    }
    write_pickle(tmp_path / "a.pt", stored)

    check_shares(tmp_path)
    with restricted_loading():
        read = torch.load(tmp_path / "a.pt", weights_only=False)

    assert read["stage"] is ZeroStageEnum(3)
    assert read["place"] == stored["place"]
    assert read["scaler"].cur_scale == 2.0
    assert torch.equal(read["w"], stored["w"])


@pytest.mark.parametrize("before", [{}, {VARIABLES[0]: "0"}, {VARIABLES[1]: "1"}])
def test_restriction_ends_with_its_context_and_outranks_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    marker = tmp_path / "ran"
    write_pickle(tmp_path / "a.pt", RunsCode(marker))

    with restricted_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=False)

    assert not marker.exists()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == before
