"""Every kernel compiles for every architecture, fits into its shared memory, and spills nothing on sm_90; no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from coupalign.config.load import read_config
from coupalign.config.schema import TimmBackbone
from coupalign.errors import InputError
from coupalign.model.backbone import StagedBackbone
from tests.kernels.test_fused import operands

resources = pytest.importorskip("coupalign.kernels.resources", reason="Triton is not installed")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_registers_and_shared_memory() -> None:
    """A process of its own: in this one the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "coupalign", "bench", "registers", "--json"],
        env=environment,
        text=True,
        capture_output=True,
    )
    *shown, rows = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"{done.stderr[-2000:]}\n" + "\n".join(
        line for line in shown if " bytes " in line or "compile" in line
    )
    rows = json.loads(rows)
    compiled = {(row["arch"], row["dtype"], row["kernel"], row["channels"]) for row in rows}
    for arch, dtype, width in product(
        ("sm_80", "sm_90", "sm_100"),
        ("float32", "float16", "bfloat16"),
        {width for stages in resources.STAGES.values() for width in stages},
    ):
        for direction in ("forward", "backward"):
            wide = dtype == "float32" or width > 256
            assert (
                arch,
                dtype,
                f"{direction}_wide" if wide else direction,
                "any" if wide else width,
            ) in compiled
    assert {row["kernel"] for row in rows} == {
        name.removesuffix("_kernel") for name in resources.IN_PIXEL_TYPE
    }
    assert all(row["registers"] > 16 for row in rows)
    on_tensor_cores = [
        row["tensor cores"]
        for row in rows
        if row["kernel"] in ("forward", "backward") and row["arch"] == "sm_90"
    ]
    assert all("wgmma" in used for used in on_tensor_cores)


def test_a_fault_is_a_fault() -> None:
    case = resources.Case("forward_kernel", 90, torch.bfloat16, 128)
    good = resources.Resources(case, 255, 0, 227 * 1024, "wgmma")
    assert good.fault is None
    assert "spilled" in replace(good, spilled=8).fault
    assert replace(good, spilled=8, case=replace(case, architecture=80), shared=1024).fault is None
    assert "shared memory" in replace(good, shared=227 * 1024 + 1).fault
    assert "does not compile" in replace(good, failure="no").fault


def test_the_stages_are_those_of_the_backbones() -> None:
    names = {
        "swin_t": "swin_tiny_patch4_window7_224",
        "swin_b": "swin_base_patch4_window12_384",
        "resnet101": "resnet101",
        "swin_l": "swin_large_patch4_window12_384",
        "darknet53": "darknet53",
    }
    demo = read_config(Path(__file__).parents[2] / "configs" / "demo.yaml")
    images = {name: TimmBackbone(name=names[name], weights="random") for name in names} | {
        "small": demo.model.image
    }
    with torch.device("meta"):
        assert {
            name: tuple(StagedBackbone(image, 384).channels) for name, image in images.items()
        } == resources.STAGES


def test_the_types_compiled_are_the_types_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from coupalign.kernels import fused

    seen = {}

    class Recorded:
        def __init__(self, name: str, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                names = [
                    name
                    for name in self.kernel.arg_names
                    if name.isupper() and name not in ("C", "HEADS", "P_", "C_", "W", "W_HEAD")
                ]
                seen[self.name] = {
                    name for name, x in zip(names, arguments) if x.dtype == torch.float16
                }
                assert all(
                    x.dtype in (torch.float16, torch.float32) for x in arguments[: len(names)]
                )
                return self.kernel[grid](*arguments, **constants)

            return launch

    for name in resources.IN_PIXEL_TYPE:
        monkeypatch.setattr(fused, name, Recorded(name, getattr(fused, name)))
    for channels in (64, 320):
        leaves = [x.requires_grad_() for x in operands((1, 20, 5, channels, 1), torch.float16)[:4]]
        sum(x.float().sum() for x in fused.bidirectional_attention(*leaves)).backward()
    assert seen == resources.IN_PIXEL_TYPE


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used here")
def test_the_interpreter_has_no_registers() -> None:
    with pytest.raises(InputError, match="unset it"):
        list(resources.measure([]))
