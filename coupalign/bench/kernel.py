"""`coupalign bench kernel`: word-pixel alignment in every way it can be written, at the four stages of a backbone.

On a GPU the time is that of a captured CUDA graph with a cold L2, so that variants of many small kernels do not pay for
their launches: what is compared is what the GPU does. On a CPU the variants that run there are timed as they are.
Bytes are counted, operator by operator, as `traffic.py` says.

Shape legend: B batch, P pixels, T words, C pixel channels, D text width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from tqdm import tqdm

from coupalign.costs.traffic import BYTES_PER_S, Traffic, one_operator_attention
from coupalign.errors import InputError
from coupalign.kernels import obstacle
from coupalign.model.wpa import WordPixelAlignment

STAGES = ((14_400, 128), (3_600, 256), (900, 512), (225, 1024))  # P, C of Swin-B at 480 x 480
WORDS, TEXT_WIDTH = 20, 768
EAGER, COMPILED, ABSORBED, ABSORBED_COMPILED, SDPA, FLEX, REFERENCE, FUSED, KERNEL = VARIANTS = (
    "eager",
    "eager, compiled",
    "absorbed",
    "absorbed, compiled",
    "two SDPA",
    "two FlexAttention, compiled",
    "impl: reference",
    "impl: fused",
    "the fused kernel alone",
)
DIRECTIONS = ("forward", "backward", "both")
Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Timing:
    """One variant at one stage in one direction; ms are the median and the middle 60 %."""

    variant: str
    batch: int
    pixels: int
    channels: int
    direction: str
    ms: float | None
    low: float | None = None
    high: float | None = None
    peak_mb: float | None = None  # allocated beyond the operands, forward and backward
    why: str = ""  # why there is no time


@dataclass(frozen=True)
class Copy:
    """A device-to-device copy of a stage's pixels: the bandwidth to compare with."""

    batch: int
    pixels: int
    channels: int
    ms: float
    gb_per_s: float


@dataclass(frozen=True)
class KernelBench:
    """All timings of one run, and the bytes that each variant moves."""

    device: str
    torch: str
    dtype: str
    words: int
    timings: tuple[Timing, ...]
    copies: tuple[Copy, ...]
    gigabytes: dict[
        str, dict[str, float]
    ]  # variant -> direction -> of 32 images at all four stages, counted

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_kernel(
    batches: Sequence[int] | None = None, stages: Sequence[tuple[int, int]] = STAGES
) -> KernelBench:
    """Time every variant that runs here; batches default to 8 and 32 on a GPU, 2 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = batches or ((8, 32) if device.type == "cuda" else (2,))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timings, copies = [], []
    torch._functorch.config.donated_buffer = (
        False  # a compiled backward is run many times over one forward
    )
    bar = tqdm(
        total=len(batches) * len(stages) * len(VARIANTS),
        unit="variant",
        desc=f"bench kernel on {device.type}",
    )
    with bar, _own_stream(device):
        for batch in batches:
            for pixels, channels in stages:
                copies.append(_copy(batch, pixels, channels, dtype, device))
                for variant in VARIANTS:
                    bar.set_postfix_str(f"{batch} x {pixels} x {channels}: {variant}")
                    timings += _timings(variant, batch, pixels, channels, dtype, device)
                    bar.update()
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return KernelBench(
        name,
        torch.__version__,
        str(dtype).removeprefix("torch."),
        WORDS,
        tuple(timings),
        tuple(copies),
        counted(stages),
    )


# ---------------------------------------------------------------------------------------------------------- variants


def variant_of(
    name: str, channels: int, device: torch.device | str
) -> tuple[Attend, WordPixelAlignment]:
    """(pixels [B, P, C], words [B, T, D], mask [B, T]) -> both messages, and the module whose weights it uses.

    Raises:
        InputError: it cannot run here; the message says why.
    """
    torch.manual_seed(0)
    with torch.device(device):
        module = WordPixelAlignment(
            channels, TEXT_WIDTH, impl="fused" if name == FUSED else "reference"
        )
    written = {
        EAGER: _eager,
        COMPILED: _eager,
        ABSORBED: _absorbed,
        ABSORBED_COMPILED: _absorbed,
        SDPA: _two_sdpa,
        FLEX: _two_flex,
    }
    attend = partial(written[name], module) if name in written else module.attend
    return (torch.compile(attend, dynamic=False) if "compiled" in name else attend), module


def _eager(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The way every public implementation writes it; autocast chooses the types."""
    query, key, word_value, pixel_value = _projected(module, v, words)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    over_words = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    over_pixels = scores.softmax(-2)
    return (over_words @ word_value)[:, 0], (over_pixels.transpose(-1, -2) @ pixel_value)[
        :, 0
    ] * mask[..., None]


def _absorbed(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The same without projections of the pixels."""
    keys, values, bias = module.absorb(words, mask)
    scores = v @ keys.transpose(-1, -2) + bias[:, None]
    over_words, over_pixels = (
        scores.softmax(-1),
        scores.masked_fill(~mask[:, None], 0.0).softmax(-2),
    )
    message = F.linear(
        over_pixels.transpose(-1, -2) @ v, module.pixel_value_weight, module.pixel_value_bias
    )
    return over_words @ values, message * mask[..., None]


def _projected(module: WordPixelAlignment, v: Tensor, words: Tensor) -> list[Tensor]:
    """Queries, keys, word values and pixel values, with the axis of the one head."""
    weights = (
        (v, module.query_weight, module.query_bias),
        (words, module.key_weight, module.key_bias),
        (words, module.word_value_weight, module.word_value_bias),
        (v, module.pixel_value_weight, module.pixel_value_bias),
    )
    return [F.linear(x, weight, bias)[:, None] for x, weight, bias in weights]


def _two_sdpa(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    query, key, word_value, pixel_value = _projected(module, v, words)
    from_words = F.scaled_dot_product_attention(
        query, key, word_value, attn_mask=mask[:, None, None]
    )
    from_pixels = F.scaled_dot_product_attention(key, query, pixel_value)
    return from_words[:, 0], from_pixels[:, 0] * mask[..., None]


def _two_flex(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    query, key, word_value, pixel_value = _projected(module, v, words)
    from_words = flex_attention(
        query,
        key,
        word_value,
        score_mod=lambda s, b, h, p, t: torch.where(mask[b, t], s, -torch.inf),
    )
    from_pixels = flex_attention(key, query, pixel_value)
    return from_words[:, 0], from_pixels[:, 0] * mask[..., None]


def _operands(
    variant: str, batch: int, pixels: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Attend, list[Tensor], list[Tensor]]:
    """What to call, with what, and what else gets a gradient."""
    v = torch.randn(batch, pixels, channels, device=device, dtype=dtype, requires_grad=True)
    if variant == KERNEL:
        from coupalign.kernels import fused

        rows = [
            torch.randn(batch, WORDS, channels, device=device)
            .mul_(channels**-0.25)
            .requires_grad_()
            for _ in range(2)
        ]
        return (
            fused.bidirectional_attention,
            [v, *rows, torch.zeros(batch, WORDS, device=device, requires_grad=True)],
            [],
        )
    words = torch.randn(batch, WORDS, TEXT_WIDTH, device=device, requires_grad=True)
    mask = (
        torch.arange(WORDS, device=device) < torch.arange(batch, device=device)[:, None] % WORDS + 1
    )
    attend, module = variant_of(variant, channels, device)
    used = [p for name, p in module.named_parameters() if not name.startswith(("gate", "norm"))]
    return attend, [v, words, mask], used


# ------------------------------------------------------------------------------------------------------------- timing


def _timings(
    variant: str, batch: int, pixels: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Timing]:
    make = partial(Timing, variant, batch, pixels, channels)
    why = obstacle() if variant in (FUSED, KERNEL) else None
    if why is None and variant in (FUSED, KERNEL) and device.type != "cuda":
        why = "there is no NVIDIA GPU here, and the interpreter is not timed"
    if why is None and variant == FLEX and device.type != "cuda":
        why = "FlexAttention has no backward on a CPU"
    if why:
        yield from (make(direction, None, why=why) for direction in DIRECTIONS)
        return
    try:
        torch._dynamo.reset()
        calls, peak = _calls(variant, batch, pixels, channels, dtype, device)
        yield from [
            make(direction, *_milliseconds(call, device), peak) for direction, call in calls.items()
        ]
    except (
        RuntimeError,
        InputError,
        torch._dynamo.exc.TorchDynamoException,
    ) as error:  # a rival that this shape does not suit
        if variant in (EAGER, ABSORBED, REFERENCE, FUSED, KERNEL):
            raise
        yield from (
            make(direction, None, why=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
            for direction in DIRECTIONS
        )


def _calls(
    variant: str, batch: int, pixels: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], Any]], float | None]:
    """A function without arguments for each direction, and the peak of memory in MB on a GPU."""
    attend, inputs, weights = _operands(variant, batch, pixels, channels, dtype, device)
    leaves = [x for x in (*inputs, *weights) if x.requires_grad]

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return attend(*inputs)

    gradients = [torch.randn_like(x) for x in forward()]
    backward = partial(
        torch.autograd.grad, grad_outputs=gradients, retain_graph=True, allow_unused=True
    )
    peak = None
    if device.type == "cuda":
        backward(forward(), leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(forward(), leaves)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    outputs = forward()
    return {
        "forward": forward,
        "backward": lambda: backward(outputs, leaves),
        "both": lambda: backward(forward(), leaves),
    }, peak


def _milliseconds(call: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Median, and the 20th and 80th percentile."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(_captured(call).replay, quantiles=[0.5, 0.2, 0.8]))
    times = sorted(
        1e3 * t
        for t in Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.5).times
    )
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


def _own_stream(device: torch.device) -> AbstractContextManager:
    """Autograd runs backward on the stream of forward, and a graph is captured on one stream that is not the default."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph


def _copy(batch: int, pixels: int, channels: int, dtype: torch.dtype, device: torch.device) -> Copy:
    source = torch.randn(batch, pixels, channels, device=device, dtype=dtype)
    target = torch.empty_like(source)
    ms, _, _ = _milliseconds(lambda: target.copy_(source), device)
    return Copy(batch, pixels, channels, ms, 2 * source.nbytes / ms / 1e6)


# -------------------------------------------------------------------------------------------------------------- bytes


def kernel_bytes(
    direction: str, batch: int, pixels: int, channels: int, itemsize: int = 2, words: int = WORDS
) -> int:
    """The least that the kernel can move: pixels in and out (and the gradient of what came out), and the word side once."""
    tiles, rows = batch * pixels * channels * itemsize, batch * words * (channels + 1) * 4
    forward, backward = 2 * tiles + 3 * rows, 3 * tiles + 6 * rows
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def counted(
    stages: Sequence[tuple[int, int]] = STAGES, batch: int = 32
) -> dict[str, dict[str, float]]:
    """Gigabytes that each eager variant moves over the stages under bfloat16 autocast; compiled ones are not eager."""
    found = {
        name: dict.fromkeys(("forward", "backward"), 0.0)
        for name in (EAGER, ABSORBED, SDPA, REFERENCE)
    }
    for name, sums in found.items():
        for pixels, channels in stages:
            with FakeTensorMode(), one_operator_attention():
                attend, inputs, weights = _operands(
                    name, batch, pixels, channels, torch.bfloat16, torch.device("cpu")
                )
                with Traffic() as forward, torch.autocast("cpu", torch.bfloat16):
                    outputs = attend(*inputs)
                gradients = [torch.empty_like(x) for x in outputs]
                with Traffic() as backward:
                    torch.autograd.grad(
                        outputs, [x for x in (*inputs, *weights) if x.requires_grad], gradients
                    )
            sums["forward"] += forward.total.bytes / 1e9
            sums["backward"] += backward.total.bytes / 1e9
    found[KERNEL] = {
        direction: sum(kernel_bytes(direction, batch, *stage) for stage in stages) / 1e9
        for direction in DIRECTIONS[:2]
    }
    return found


# ------------------------------------------------------------------------------------------------------------- tables


def table(bench: KernelBench) -> str:
    """For people: times by stage, ratios over all stages, the kernel's share of a copy's bandwidth, bytes."""
    parts = [
        f"{bench.device}, torch {bench.torch}, {bench.dtype}, {bench.words} words, text width {TEXT_WIDTH}; median ms"
    ]
    for batch in sorted({t.batch for t in bench.timings}):
        for direction in DIRECTIONS:
            parts += ["", *_times(bench, batch, direction)]
        parts += ["", *_shares(bench, batch)]
    parts += [
        "",
        "counted bytes of 32 images over the four stages of Swin-B at 480, bfloat16 autocast, and their floor at "
        f"{BYTES_PER_S / 1e12} TB/s",
        f"{'':<28}{'forward':>22}{'backward':>22}",
    ]
    for name, sums in bench.gigabytes.items():
        cells = (
            f"{sums[direction]:.2f} GB {sums[direction] / BYTES_PER_S * 1e15:>5.0f} us"
            for direction in DIRECTIONS[:2]
        )
        parts.append(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(parts)


def _times(bench: KernelBench, batch: int, direction: str) -> Iterator[str]:
    rows = [t for t in bench.timings if t.batch == batch and t.direction == direction]
    stages = list(dict.fromkeys((t.pixels, t.channels) for t in rows))
    head = "".join(f"{f'{p} x {c}':>14}" for p, c in stages)
    yield f"{f'batch {batch}, {direction}':<28}{head}{'sum':>10}{'eager / it':>12}{'peak MB':>9}"
    eager = _sum(rows, EAGER)
    for variant in VARIANTS:
        of = [t for t in rows if t.variant == variant]
        total = _sum(rows, variant)
        cells = "".join(f"{'-' if t.ms is None else f'{t.ms:.3f}':>14}" for t in of)
        ratio = f"{eager / total:.2f}" if eager and total and variant != KERNEL else ""
        peak = max((t.peak_mb for t in of if t.peak_mb is not None), default=None)
        yield f"{variant:<28}{cells}{'-' if total is None else f'{total:.3f}':>10}{ratio:>12}{'' if peak is None else f'{peak:.0f}':>9}"
        if total is None:
            yield f"    {next(t.why for t in of if t.why)}"


def _sum(rows: Sequence[Timing], variant: str) -> float | None:
    times = [t.ms for t in rows if t.variant == variant]
    return None if None in times else sum(times)


def _shares(bench: KernelBench, batch: int) -> Iterator[str]:
    """Achieved bandwidth of the kernel alone, by the least bytes it can move, beside a copy of the same pixels."""
    itemsize = 2 if bench.dtype == "bfloat16" else 4
    yield f"{f'batch {batch}, GB/s':<28}{'copy':>14}{'forward':>18}{'backward':>18}"
    for copy in (c for c in bench.copies if c.batch == batch):
        cells = ""
        for direction in DIRECTIONS[:2]:
            ms = next(
                t.ms
                for t in bench.timings
                if (t.variant, t.batch, t.pixels, t.direction)
                == (KERNEL, batch, copy.pixels, direction)
            )
            rate = (
                kernel_bytes(direction, batch, copy.pixels, copy.channels, itemsize) / ms / 1e6
                if ms
                else None
            )
            cells += f"{'-' if rate is None else f'{rate:,.0f} ({rate / copy.gb_per_s:.0%})':>18}"
        yield f"{f'{copy.pixels} x {copy.channels}':<28}{copy.gb_per_s:>14,.0f}{cells}"
