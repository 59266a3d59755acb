"""What each kernel asks of a GPU, compiled ahead of time: no GPU, no driver and no CUDA toolkit are needed."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coupalign.errors import InputError
from coupalign.kernels import fused
from coupalign.kernels.plan import MOST_CHANNELS, Direction, KernelPlan, plan_kernels, refusal

# Channels after the four stages of each supported backbone.
STAGES = {
    "swin_t": (96, 192, 384, 768),
    "swin_b": (128, 256, 512, 1024),
    "swin_l": (192, 384, 768, 1536),
    "resnet101": (256, 512, 1024, 2048),
    "darknet53": (128, 256, 512, 1024),
    "small": (32, 64, 96, 128),
}  # small: the demo's
# Bytes of shared memory that one program can have, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
SPILL_FREE = 90  # the architecture for which the tilings were chosen
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Arguments that have the type of the pixels; all other tensors are float32.
IN_PIXEL_TYPE = {
    "forward_kernel": {"PIXELS", "FROM_WORDS"},
    "forward_wide_kernel": {"PIXELS", "KEYS", "VALUES", "FROM_WORDS"},
    "forward_combine_kernel": set(),
    "backward_prepare_kernel": {"K", "U", "G"},
    "backward_kernel": {
        "PIXELS",
        "GRAD_FROM_WORDS",
        "KEYS",
        "VALUES",
        "GRAD_FROM_PIXELS",
        "GRAD_PIXELS",
    },
    "backward_wide_kernel": {
        "PIXELS",
        "GRAD_FROM_WORDS",
        "KEYS",
        "VALUES",
        "GRAD_FROM_PIXELS",
        "GRAD_PIXELS",
    },
    "backward_combine_kernel": set(),
}


@dataclass(frozen=True)
class Case:
    """A kernel for a shape on an architecture."""

    kernel: str
    architecture: int  # compute capability x 10
    dtype: torch.dtype
    channels: int | None  # none: the kernel is the same for any number
    words: int = 20
    heads: int = 1

    @property
    def helper(self) -> bool:
        """Whether it is one of the small kernels before and after."""
        return "combine" in self.kernel or "prepare" in self.kernel

    @property
    def plan_kernels(self) -> KernelPlan:
        direction: Direction = "forward" if self.kernel.startswith("forward") else "backward"
        channels = self.channels or MOST_CHANNELS
        return plan_kernels(
            direction,
            32,
            14_400,
            self.words,
            channels,
            self.heads,
            self.dtype,
            SHARED_MEMORY[self.architecture],
        )


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for a case."""

    case: Case
    registers: int  # of one thread
    spilled: int  # bytes of one thread
    shared: int  # bytes of one program
    tensor_cores: str  # which matrix instructions: wgmma, mma.sync, tcgen05 or none
    failure: str = ""  # what the compiler said, where it gave up

    @property
    def fault(self) -> str | None:
        """Why this case must not ship."""
        if self.failure:
            return f"does not compile: {self.failure}"
        limit = SHARED_MEMORY[self.case.architecture]
        if self.shared > limit:
            return f"{self.shared:,} bytes of shared memory are more than {limit:,}"
        if self.spilled and self.case.architecture == SPILL_FREE:
            return f"{self.spilled} bytes a thread are spilled"
        return None

    def row(self) -> dict[str, str | int]:
        """Plain values for a table or JSON."""
        case, tiling = self.case, self.case.plan.tiling
        tile = f"{tiling.pixels}x{tiling.channels} {tiling.warps}w {tiling.stages}s"
        return {
            "arch": f"sm_{case.architecture}",
            "kernel": case.kernel.removesuffix("_kernel"),
            "dtype": str(case.dtype).removeprefix("torch."),
            "channels": case.channels or "any",
            "words": case.words,
            "heads": case.heads,
            "tile": "" if case.helper else tile,
            "registers": self.registers,
            "spilled": self.spilled,
            "shared": self.shared,
            "tensor cores": self.tensor_cores,
            "fault": self.fault or "",
        }


def cases(
    architectures: Sequence[int] = (80, 90, 100),
    dtypes: Sequence[torch.dtype] = tuple(TYPES),
    columns: Sequence[tuple[int, int]] = ((20, 1),),
) -> list[Case]:
    """Every kernel that a backbone stage can need x architecture x type x (words, heads), each once."""
    widths = sorted({width for stages in STAGES.values() for width in stages})
    wanted = (_needed(*shape) for shape in product(architectures, columns, dtypes, widths))
    return list(dict.fromkeys(chain.from_iterable(wanted)))


def _needed(
    architecture: int, columns: tuple[int, int], dtype: torch.dtype, width: int
) -> Iterator[Case]:
    """The kernels of one shape."""
    if refusal((1, 1, width), *columns, dtype):
        return
    for direction in ("forward", "backward"):
        narrow = Case(f"{direction}_kernel", architecture, dtype, width, *columns)
        yield (
            replace(narrow, kernel=f"{direction}_wide_kernel", channels=None)
            if narrow.plan.wide
            else narrow
        )
        yield Case(
            f"{direction}_combine_kernel", architecture, torch.bfloat16, None, *columns
        )  # whatever the type of the pixels
    yield Case("backward_prepare_kernel", architecture, dtype, None, *columns)


def everything() -> list[Case]:
    """What `coupalign bench registers` shows: every kernel x type x backbone stage on the data-center GPUs with 20 words; on
    sm_90 every number of columns as well; and GPUs with little shared memory, where only the sum of both decides."""
    columns = ((16, 1), (64, 1), (20, 2), (64, 2), (20, 4), (64, 4))
    return [
        *cases(),
        *cases((SPILL_FREE,), columns=columns),
        *cases((89, 120), (torch.bfloat16,), ((20, 1), (64, 4))),
    ]


def measure(wanted: Sequence[Case], processes: int = os.cpu_count() or 1) -> Iterator[Resources]:
    """Compile the cases side by side; results come in their order.

    Raises:
        InputError: this process, or its children, would interpret the kernels instead.
    """
    if triton.knobs.runtime.interpret:
        raise InputError(
            "TRITON_INTERPRET is set: unset it, the interpreter has no registers to count"
        )
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, wanted, chunksize=4)


def table(results: Iterable[Resources]) -> str:
    """For people."""
    rows = [{name: str(value) for name, value in result.row().items()} for result in results]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [dict(zip(widths, widths)), *rows]
    return "\n".join(
        "  ".join(f"{line[name]:<{width}}" for name, width in widths.items()).rstrip()
        for line in lines
    )


def compile_case(case: Case) -> Resources:
    """Compile one case and read what it needs from the cubin."""
    kernel, cut = getattr(fused, case.kernel), case.plan
    constants = {"HEADS": case.heads, **(cut.helper_constants if case.helper else cut.constants)}
    if case.channels:
        constants["C"] = case.channels
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(case, name) for name in names}
    # What the launcher's specialization finds out: torch allocates at multiples of 16 bytes, and every width is one of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name == "C" and not case.channels)
    }
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = (
        {"num_warps": 4}
        if case.helper
        else {"num_warps": cut.tiling.warps, "num_stages": cut.tiling.stages}
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", case.architecture, 32), options=options
        )
    except (
        Exception
    ) as error:  # whatever the compiler throws is a finding about this case, and the others go on
        return Resources(
            case, 0, 0, 0, "none", f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
        )
    registers, spilled = _registers(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    used = [name for name in ("wgmma", "mma.sync", "tcgen05.mma") if f"{name}." in ptx]
    return Resources(case, registers, spilled, compiled.metadata.shared, " + ".join(used) or "none")


def _type(case: Case, name: str) -> str:
    if name == "C" or not name.isupper():
        return "fp32" if name == "finer" else "i32"
    return TYPES[case.dtype] if name in IN_PIXEL_TYPE[case.kernel] else "*fp32"


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread; kernels without local arrays have local memory by spilling only."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return found["REG"], found["STACK"] + found["LOCAL"]
