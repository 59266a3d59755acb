"""Compile each kernel ahead of time and count what it needs of a GPU.

No GPU, no driver and no CUDA toolkit are needed.
"""

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
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coupalign.errors import InputError
from coupalign.kernels import fused
from coupalign.kernels.plan import MAX_CHANNELS, Direction, KernelPlan, plan_kernels, refusal

# Channels after the four stages of each supported backbone; `small` is the demo's.
STAGES = {
    "swin_t": (96, 192, 384, 768),
    "swin_b": (128, 256, 512, 1024),
    "swin_l": (192, 384, 768, 1536),
    "resnet101": (256, 512, 1024, 2048),
    "darknet53": (128, 256, 512, 1024),
    "small": (32, 64, 96, 128),
}
# Shared memory per program in bytes, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# The architecture that the tilings were chosen for: nothing may spill there.
SPILL_FREE = 90

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}

_WORD_SIDE = {"KEYS", "VALUES", "GRAD_FROM_PIXELS"}
_PIXEL_SIDE = {"PIXELS", "GRAD_FROM_WORDS", "GRAD_PIXELS"}
# Arguments in the type of the pixels. All other tensors are float32.
IN_PIXEL_TYPE = {
    "forward_kernel": {"PIXELS", "FROM_WORDS"},
    "forward_wide_kernel": {"PIXELS", "KEYS", "VALUES", "FROM_WORDS"},
    "forward_combine_kernel": set(),
    "backward_prepare_kernel": {"ROUNDED_KEYS", "ROUNDED_VALUES", "ROUNDED_GRAD"},
    "backward_kernel": _PIXEL_SIDE | _WORD_SIDE,
    "backward_wide_kernel": _PIXEL_SIDE | _WORD_SIDE,
    "backward_combine_kernel": set(),
}


@dataclass(frozen=True)
class Case:
    """One kernel for one shape on one architecture."""

    kernel: str
    architecture: int  # compute capability x 10
    dtype: torch.dtype
    channels: int | None  # None: the same kernel serves any number
    words: int = 20

    @property
    def helper(self) -> bool:
        """Whether it is one of the small kernels: prepare or combine."""
        return "combine" in self.kernel or "prepare" in self.kernel

    @property
    def plan(self) -> KernelPlan:
        """How the kernel is launched for 32 images of 14,400 pixels."""
        direction: Direction = "forward" if self.kernel.startswith("forward") else "backward"
        return plan_kernels(
            direction,
            batch=32,
            pixels=14_400,
            words=self.words,
            channels=self.channels or MAX_CHANNELS,
            dtype=self.dtype,
            shared_memory=SHARED_MEMORY[self.architecture],
        )


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for a case.

    Attributes:
        registers: per thread.
        spilled: bytes per thread.
        shared: bytes of shared memory per program.
        tensor_cores: the matrix instructions used: wgmma, mma.sync, tcgen05.mma or none.
        failure: the compiler's message if it failed.
    """

    case: Case
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    failure: str = ""

    @property
    def fault(self) -> str | None:
        """Say why this kernel must not ship, or return None."""
        if self.failure:
            return f"does not compile: {self.failure}"
        limit = SHARED_MEMORY[self.case.architecture]
        if self.shared > limit:
            return f"{self.shared:,} bytes of shared memory are more than {limit:,}"
        if self.spilled and self.case.architecture == SPILL_FREE:
            return f"{self.spilled} bytes per thread are spilled"
        return None

    def row(self) -> dict[str, str | int]:
        """Return plain values for a table or JSON."""
        case, tiling = self.case, self.case.plan.tiling
        tile = f"{tiling.pixels}x{tiling.channels} {tiling.warps}w {tiling.stages}s"
        return {
            "arch": f"sm_{case.architecture}",
            "kernel": case.kernel.removesuffix("_kernel"),
            "dtype": str(case.dtype).removeprefix("torch."),
            "channels": case.channels or "any",
            "words": case.words,
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
    words: Sequence[int] = (20,),
) -> list[Case]:
    """List every kernel that a backbone stage can need, each once.

    The list covers architectures x words x dtypes x the channels of all backbone stages.
    """
    widths = sorted(set(chain.from_iterable(STAGES.values())))
    shapes = product(architectures, words, dtypes, widths)
    needed = chain.from_iterable(_needed(*shape) for shape in shapes)
    return list(dict.fromkeys(needed))


def _needed(architecture: int, words: int, dtype: torch.dtype, width: int) -> Iterator[Case]:
    """List the kernels of one shape."""
    if refusal((1, 1, width), words, heads=1, dtype=dtype):
        return

    for direction in ("forward", "backward"):
        narrow = Case(f"{direction}_kernel", architecture, dtype, width, words)
        wide = replace(narrow, kernel=f"{direction}_wide_kernel", channels=None)
        yield wide if narrow.plan.wide else narrow
        # The combine kernels are the same for every type of pixels.
        yield Case(f"{direction}_combine_kernel", architecture, torch.bfloat16, None, words)
    yield Case("backward_prepare_kernel", architecture, dtype, None, words)


def all_cases() -> list[Case]:
    """List the kernels that `coupalign bench registers` shows.

    Every kernel, type and backbone stage on the data-center GPUs with 20 words; on sm_90 the other
    numbers of columns too; and a selection for GPUs with little shared memory.
    """
    return [
        *cases(),
        *cases((SPILL_FREE,), words=(16, 64)),
        *cases((89, 120), dtypes=(torch.bfloat16,), words=(20, 64)),
    ]


def measure(wanted: Sequence[Case], processes: int = os.cpu_count() or 1) -> Iterator[Resources]:
    """Compile the cases in parallel; yield the results in the order of the cases.

    Raises:
        InputError: TRITON_INTERPRET is set, so Triton would interpret the kernels instead.
    """
    if triton.knobs.runtime.interpret:
        raise InputError(
            "TRITON_INTERPRET is set: unset it, the interpreter has no registers to count"
        )
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_case, wanted, chunksize=4)


def table(results: Iterable[Resources]) -> str:
    """Format the results as a table for people."""
    rows = [{name: str(value) for name, value in result.row().items()} for result in results]
    return tabulate(rows, headers="keys", tablefmt="plain", disable_numparse=True)


def compile_case(case: Case) -> Resources:
    """Compile one case and read from the cubin what it needs."""
    kernel, plan = getattr(fused, case.kernel), case.plan
    constants = dict(plan.helper_constants if case.helper else plan.constants)
    if case.channels:
        constants["C"] = case.channels
    if case.helper:
        options = {"num_warps": 4}
    else:
        options = {"num_warps": plan.tiling.warps, "num_stages": plan.tiling.stages}

    # What the launcher would find out about the arguments: torch allocates at multiples of 16
    # bytes, and every backbone's width is a multiple of 16.
    signature, alignment = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type(case, name)
        if signature[name].startswith("*") or (name == "C" and not case.channels):
            alignment[(position,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}

    source = ASTSource(kernel, signature, values, alignment)
    target = GPUTarget("cuda", case.architecture, 32)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        # Whatever the compiler raises is a finding about this case; the other cases continue.
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
        return Resources(case, 0, 0, 0, "none", failure)

    registers, spilled = _registers_and_spills(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    used = [name for name in ("wgmma", "mma.sync", "tcgen05.mma") if f"{name}." in ptx]
    tensor_cores = " + ".join(used) or "none"
    return Resources(case, registers, spilled, compiled.metadata.shared, tensor_cores)


def _type(case: Case, name: str) -> str:
    """Return the Triton type of a kernel's argument."""
    if name == "weight_exponent":
        return "fp32"
    if name == "C" or not name.isupper():
        return "i32"
    return TYPES[case.dtype] if name in IN_PIXEL_TYPE[case.kernel] else "*fp32"


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Read the registers and the bytes of local memory per thread.

    A kernel without local arrays has local memory only because it spills.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
