"""Every kernel compiles for every architecture, fits its shared memory, and none spills on sm_90.

No GPU is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path

import pytest
import torch

from coupalign.config.load import read_config
from coupalign.config.schema import TimmBackbone
from coupalign.errors import InputError
from coupalign.model.backbone import StagedBackbone
from tests.kernels.test_fused import operands

triton = pytest.importorskip("triton", reason="Triton is not installed")
resources = pytest.importorskip("coupalign.kernels.resources")
register_table = pytest.importorskip("tests.kernels.register_table")

# All kernels take two minutes of two cores. A busy machine needs more.
COMPILES_S = 1200


@dataclass(frozen=True)
class Compiled:
    """What is known of every kernel.

    Attributes:
        rows: those of all kernels; of the committed table where this run compiled nothing itself.
        fresh: the names of the kernels that this run compiled.
        differences: fresh rows that are not those of the committed table.
        stale: why this run compiled all kernels, or None.
    """

    rows: list[dict[str, str]]
    fresh: set[tuple[str, ...]]
    differences: list[str]
    stale: str | None


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Compile a sixth of the kernels, or all of them if the committed table is of other ones."""
    table = register_table.read_table()
    stale = None
    if table.triton_version != triton.__version__:
        stale = f"the table is of Triton {table.triton_version}, this is {triton.__version__}"
    elif table.source != register_table.source_hash():
        stale = "the source of the kernels has changed"

    done = register_table.compile_in_new_process(None if stale else part_of_today())
    *shown, last = done.stdout.splitlines() or [""]
    faults = [line for line in shown if " bytes " in line or "compile" in line]
    assert done.returncode == 0, "\n".join([done.stderr[-2000:], *faults])
    fresh = register_table.by_name(json.loads(last))

    rows = fresh if stale else table.rows | fresh
    differences = [
        f"{' '.join(name)}\n  compiled: {row}\n  in the table: {table.rows.get(name)}"
        for name, row in fresh.items()
        if row != table.rows.get(name)
    ]
    return Compiled(list(rows.values()), set(fresh), differences, stale)


def part_of_today() -> int:
    """Choose the sixth: another one each day, or REGISTERS_PART, such as the number of a CI job."""
    return int(os.environ.get("REGISTERS_PART", date.today().toordinal())) % register_table.PARTS


@pytest.mark.slow
@pytest.mark.timeout(COMPILES_S)
def test_kernels_compile_to_the_committed_table(
    compiled: Compiled, note: Callable[[str], None]
) -> None:
    how_to_write = f"to write the table: {register_table.WRITE}"

    if compiled.stale and "Triton" in compiled.stale:
        # Another compiler may use other registers. The tests below hold for its kernels, too.
        note(f"registers: compiled all kernels and compared none with the table: {compiled.stale}")
        return

    assert not compiled.differences, "\n".join([*compiled.differences, how_to_write])
    if compiled.stale:
        note(
            "registers: compiled all kernels, they are as in the table although "
            f"{compiled.stale}; {how_to_write}"
        )
    else:
        note(
            f"registers: compiled part {part_of_today()} (of 0 to {register_table.PARTS - 1}), "
            f"{len(compiled.fresh)} of {len(compiled.rows)} kernels, as the table has them"
        )


@pytest.mark.slow
@pytest.mark.timeout(COMPILES_S)
def test_no_kernel_has_a_fault_and_all_that_can_use_tensor_cores(compiled: Compiled) -> None:
    assert [row for row in compiled.rows if row["fault"]] == []
    assert all(int(row["registers"]) > 16 for row in compiled.rows)

    on_tensor_cores = [
        row["tensor cores"]
        for row in compiled.rows
        if row["kernel"] in ("forward", "backward") and row["arch"] == "sm_90"
    ]
    assert on_tensor_cores and all("wgmma" in used for used in on_tensor_cores)


@pytest.mark.slow
@pytest.mark.timeout(COMPILES_S)
def test_every_stage_type_and_architecture_has_its_kernels(compiled: Compiled) -> None:
    known = {tuple(row[column] for column in register_table.NAMES[:4]) for row in compiled.rows}
    widths = {width for stages in resources.STAGES.values() for width in stages}
    architectures = ("sm_80", "sm_90", "sm_100")
    dtypes = ("float32", "float16", "bfloat16")

    for arch, dtype, width in product(architectures, dtypes, widths):
        wide = dtype == "float32" or width > 256
        for direction in ("forward", "backward"):
            kernel = f"{direction}_wide" if wide else direction
            channels = "any" if wide else str(width)
            assert (arch, kernel, dtype, channels) in known

    kernels = {name.removesuffix("_kernel") for name in resources.IN_PIXEL_TYPE}
    assert {row["kernel"] for row in compiled.rows} == kernels
    assert len(compiled.rows) == len(resources.all_cases())


def test_the_parts_of_six_runs_are_all_kernels() -> None:
    parts = [register_table.part_of_cases(part) for part in range(register_table.PARTS)]
    joined = [case for part in parts for case in part]

    assert len(joined) == len(set(joined))
    assert set(joined) == set(resources.all_cases())
    assert register_table.part_of_cases(register_table.PARTS + 2) == parts[2]


def test_comments_are_no_other_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hash_of(text: str) -> str:
        file = tmp_path / "plan.py"
        file.write_text(text)
        monkeypatch.setattr(register_table.plan, "__file__", str(file))
        return register_table.source_hash()

    first = hash_of('"""Plan."""\n\n\ndef tiles():\n    """Say how many."""\n    return 64\n')

    assert hash_of("def tiles():  # as many as fit\n    return (64)\n") == first
    assert hash_of("def tiles():\n    return 32\n") != first


def test_faults_are_spills_too_much_shared_memory_and_compiler_errors() -> None:
    case = resources.Case("forward_kernel", 90, torch.bfloat16, 128)
    good = resources.Resources(case, 255, 0, 227 * 1024, "wgmma")
    spilling = replace(good, spilled=8)
    on_sm_80 = replace(case, architecture=80)

    assert good.fault is None
    assert "spilled" in spilling.fault
    assert replace(spilling, case=on_sm_80, shared=1024).fault is None
    assert "shared memory" in replace(good, shared=227 * 1024 + 1).fault
    assert "does not compile" in replace(good, failure="no").fault


def test_stages_are_those_of_the_backbones() -> None:
    names = {
        "swin_t": "swin_tiny_patch4_window7_224",
        "swin_b": "swin_base_patch4_window12_384",
        "resnet101": "resnet101",
        "swin_l": "swin_large_patch4_window12_384",
        "darknet53": "darknet53",
    }
    demo = read_config(Path(__file__).parents[2] / "configs" / "demo.yaml")
    images = {name: TimmBackbone(name=names[name], weights="random") for name in names}
    images["small"] = demo.model.image

    with torch.device("meta"):
        stages = {
            name: tuple(StagedBackbone(image, 384).channels) for name, image in images.items()
        }

    assert stages == resources.STAGES


def test_compiled_types_are_the_launched_types(monkeypatch: pytest.MonkeyPatch) -> None:
    from coupalign.kernels import fused

    seen = {}

    class Recorded:
        """A kernel that notes which of its arguments are float16."""

        def __init__(self, name: str, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                tensors = {
                    name: value
                    for name, value in zip(self.kernel.arg_names, arguments)
                    if torch.is_tensor(value)
                }
                assert {x.dtype for x in tensors.values()} <= {torch.float16, torch.float32}
                seen[self.name] = {name for name, x in tensors.items() if x.dtype == torch.float16}
                return self.kernel[grid](*arguments, **constants)

            return launch

    for name in resources.IN_PIXEL_TYPE:
        monkeypatch.setattr(fused, name, Recorded(name, getattr(fused, name)))

    # One number of channels for the narrow kernels, one for the wide ones.
    for channels in (64, 320):
        leaves = [x.requires_grad_() for x in operands((1, 20, 5, channels, 1), torch.float16)[:4]]
        outputs = fused.bidirectional_attention(*leaves)
        sum(x.float().sum() for x in outputs).backward()

    assert seen == resources.IN_PIXEL_TYPE


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used here")
def test_registers_are_not_counted_by_the_interpreter() -> None:
    with pytest.raises(InputError, match="unset it"):
        list(resources.measure([]))
