"""DeepSpeed's files are read without running code, whatever DeepSpeed asks torch for."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.engine.shares import check_shares, restricted_loading
from coupalign.errors import InputError

VARIABLES = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


class RunsCode:
    """A pickle of it creates a file when it is loaded without restrictions."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def write(file: Path, value: Any, form: str) -> None:
    """Write as torch does today ("zip"), as it did before 1.6 ("legacy"), 0.1 ("tar"), or not."""
    if form == "raw":
        file.write_bytes(pickle.dumps(value))
    elif form == "tar":
        write_tar(file, {"storages": 0, "tensors": 0, "pickle": value})
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "zip")


def write_tar(file: Path, members: dict[str, Any]) -> None:
    with tarfile.open(file, "w:") as tar:
        for name, value in members.items():
            data = pickle.dumps(value, 2)
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.mark.parametrize("form", ["zip", "legacy", "tar", "raw"])
def test_share_that_runs_code_is_refused_by_both_barriers(tmp_path: Path, form: str) -> None:
    marker, file = tmp_path / "ran", tmp_path / "mp_rank_00_model_states.pt"
    write(file, {"module": {"w": torch.zeros(3)}, "note": RunsCode(marker)}, form)

    with pytest.raises(InputError, match="mp_rank_00_model_states.pt"):
        check_shares(tmp_path)
    with restricted_loading(), pytest.raises((pickle.UnpicklingError, RuntimeError)):
        torch.load(file, weights_only=False)

    assert not marker.exists()


def test_foreign_names_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", RunsCode(tmp_path / "ran"), "zip")

    with pytest.raises(InputError, match=r"a\.pt: holds 'posix.system', which DeepSpeed does not"):
        check_shares(tmp_path)


def test_torn_share_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", {"w": torch.zeros(1000)}, "zip")
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
    write(tmp_path / "a.pt", stored, "zip")

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
    write(tmp_path / "a.pt", RunsCode(marker), "zip")

    with restricted_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=False)

    assert not marker.exists()
    assert {name: os.environ[name] for name in VARIABLES if name in os.environ} == before
