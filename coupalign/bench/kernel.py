"""`coupalign bench kernel`: compare ways to write word-pixel alignment, at the stages of Swin-B.

On a GPU, it times a captured CUDA graph with a cold L2 cache. So variants of many small kernels do
not pay for their launches, only for what the GPU does. On a CPU, it times the variants that run
there as they are. Bytes are counted, operator by operator, see `costs/traffic.py`.

Shape legend: B batch, P pixels, T words, C pixel channels, D text width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.benchmark import Timer
from tqdm import tqdm

from coupalign.bench.result import format_rows
from coupalign.costs.traffic import BYTES_PER_S, Traffic, one_operator_attention
from coupalign.errors import InputError
from coupalign.kernels import obstacle
from coupalign.model.wpa import WordPixelAlignment

# P and C at the four stages of Swin-B at 480 x 480.
STAGES = ((14_400, 128), (3_600, 256), (900, 512), (225, 1024))
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

# Variants that compilers or libraries run. Some of them refuse some shapes.
_MAY_FAIL = (COMPILED, ABSORBED_COMPILED, SDPA, FLEX)

Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one variant at one stage in one direction.

    Attributes:
        ms: median. None: not measured.
        low: 20th percentile.
        high: 80th percentile.
        peak_mb: memory allocated by forward and backward, without the operands. On a GPU only.
        why: why there is no time.
    """

    variant: str
    batch: int
    pixels: int
    channels: int
    direction: str
    ms: float | None
    low: float | None = None
    high: float | None = None
    peak_mb: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Copy:
    """A device-to-device copy of a stage's pixels: the bandwidth to compare with."""

    batch: int
    pixels: int
    channels: int
    ms: float
    gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class KernelBench:
    """All timings of one run, and the bytes that each variant moves.

    Attributes:
        gigabytes: variant -> direction -> counted for 32 images over all four stages.
    """

    device: str
    torch: str
    dtype: str
    words: int
    timings: tuple[Timing, ...]
    copies: tuple[Copy, ...]
    gigabytes: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """What is timed: a variant on pixels of one shape."""

    variant: str
    batch: int
    pixels: int
    channels: int
    dtype: torch.dtype
    device: torch.device

    def timing(self, direction: str, ms: float | None, **measured: Any) -> Timing:
        return Timing(
            variant=self.variant,
            batch=self.batch,
            pixels=self.pixels,
            channels=self.channels,
            direction=direction,
            ms=ms,
            **measured,
        )


def bench_kernel(
    batches: Sequence[int] | None = None, stages: Sequence[tuple[int, int]] = STAGES
) -> KernelBench:
    """Time every variant that runs here.

    Args:
        batches: images. Default: 8 and 32 on a GPU, 2 on a CPU.
        stages: (pixels, channels) of each stage.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    batches = batches or ((8, 32) if on_gpu else (2,))
    dtype = torch.bfloat16 if on_gpu else torch.float32

    # A compiled backward runs many times after one forward, so it must not reuse its buffers.
    functorch_config.donated_buffer = False

    timings, copies = [], []
    bar = tqdm(
        total=len(batches) * len(stages) * len(VARIANTS),
        unit="variant",
        desc=f"bench kernel on {device.type}",
    )
    with bar, _own_stream(device):
        for batch, (pixels, channels) in product(batches, stages):
            copies.append(_time_copy((batch, pixels, channels), dtype, device))
            for variant in VARIANTS:
                bar.set_postfix_str(f"{batch} x {pixels} x {channels}: {variant}")
                case = _Case(
                    variant=variant,
                    batch=batch,
                    pixels=pixels,
                    channels=channels,
                    dtype=dtype,
                    device=device,
                )
                timings += _time_variant(case)
                bar.update()

    cpu_name = f"CPU, {torch.get_num_threads()} threads"
    return KernelBench(
        device=torch.cuda.get_device_name() if on_gpu else cpu_name,
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        words=WORDS,
        timings=tuple(timings),
        copies=tuple(copies),
        gigabytes=count_gigabytes(stages),
    )


# ------------------------------------------------------------------------------------ variants


def build_variant(
    name: str, channels: int, device: torch.device | str
) -> tuple[Attend, WordPixelAlignment]:
    """Build a variant of word-pixel alignment.

    Returns:
        a function from pixels [B, P, C], words [B, T, D] and mask [B, T] to both messages,
        [B, P, C] and [B, T, D]; and the module whose weights it uses.

    Raises:
        InputError: the variant cannot run here.
    """
    torch.manual_seed(0)
    impl = "fused" if name == FUSED else "reference"
    with torch.device(device):
        module = WordPixelAlignment(channels, TEXT_WIDTH, impl=impl)

    functions = {
        EAGER: _attend_eager,
        COMPILED: _attend_eager,
        ABSORBED: _attend_absorbed,
        ABSORBED_COMPILED: _attend_absorbed,
        SDPA: _attend_two_sdpa,
        FLEX: _attend_two_flex,
    }
    attend = partial(functions[name], module) if name in functions else module.attend
    if "compiled" in name:
        attend = torch.compile(attend, dynamic=False)
    return attend, module


def _attend_eager(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Write it as every public implementation does. Autocast chooses the dtypes."""
    query, key, word_value, pixel_value = _project(module, v, words)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, 1, P, T]

    over_words = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    over_pixels = scores.softmax(-2)

    from_words = over_words @ word_value
    from_pixels = over_pixels.transpose(-1, -2) @ pixel_value
    return from_words[:, 0], from_pixels[:, 0] * mask[..., None]


def _attend_absorbed(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Write it without projections of the pixels, see `WordPixelAlignment`."""
    keys, values, bias = module.absorb(words, mask)
    scores = v @ keys.transpose(-1, -2) + bias[:, None]  # [B, P, T]

    over_words = scores.softmax(-1)
    over_pixels = scores.masked_fill(~mask[:, None], 0.0).softmax(-2)

    from_pixels = F.linear(
        over_pixels.transpose(-1, -2) @ v, module.pixel_value_weight, module.pixel_value_bias
    )
    return over_words @ values, from_pixels * mask[..., None]


def _attend_two_sdpa(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    query, key, word_value, pixel_value = _project(module, v, words)
    from_words = F.scaled_dot_product_attention(
        query, key, word_value, attn_mask=mask[:, None, None]
    )
    from_pixels = F.scaled_dot_product_attention(key, query, pixel_value)
    return from_words[:, 0], from_pixels[:, 0] * mask[..., None]


def _attend_two_flex(
    module: WordPixelAlignment, v: Tensor, words: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def mask_padding(score: Tensor, b: Tensor, h: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask[b, t], score, -torch.inf)

    query, key, word_value, pixel_value = _project(module, v, words)
    from_words = flex_attention(query, key, word_value, score_mod=mask_padding)
    from_pixels = flex_attention(key, query, pixel_value)
    return from_words[:, 0], from_pixels[:, 0] * mask[..., None]


def _project(module: WordPixelAlignment, v: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys, word values and pixel values, each with an axis for its one head."""
    query = F.linear(v, module.query_weight, module.query_bias)
    key = F.linear(words, module.key_weight, module.key_bias)
    word_value = F.linear(words, module.word_value_weight, module.word_value_bias)
    pixel_value = F.linear(v, module.pixel_value_weight, module.pixel_value_bias)
    return query[:, None], key[:, None], word_value[:, None], pixel_value[:, None]


def _operands(case: _Case) -> tuple[Attend, list[Tensor], list[Tensor]]:
    """Return the function of a variant, its inputs, and the weights that also get a gradient."""
    batch, channels, device = case.batch, case.channels, case.device
    v = torch.randn(
        batch, case.pixels, channels, device=device, dtype=case.dtype, requires_grad=True
    )

    # The kernel itself takes absorbed keys and values, and a bias.
    if case.variant == KERNEL:
        from coupalign.kernels import fused

        keys, values = (torch.randn(batch, WORDS, channels, device=device) for _ in range(2))
        for operand in (keys, values):
            operand.mul_(channels**-0.25).requires_grad_()
        bias = torch.zeros(batch, WORDS, device=device, requires_grad=True)
        return fused.bidirectional_attention, [v, keys, values, bias], []

    # Sentences of 1 … WORDS words.
    words = torch.randn(batch, WORDS, TEXT_WIDTH, device=device, requires_grad=True)
    lengths = torch.arange(batch, device=device) % WORDS + 1
    mask = torch.arange(WORDS, device=device) < lengths[:, None]

    attend, module = build_variant(case.variant, channels, device)
    unused = ("gate", "norm")
    weights = [p for name, p in module.named_parameters() if not name.startswith(unused)]
    return attend, [v, words, mask], weights


# ------------------------------------------------------------------------------------ timing


def _time_variant(case: _Case) -> list[Timing]:
    """Time a variant in each direction, or say why it cannot be timed."""
    why = _why_not(case)
    if why is None:
        try:
            torch._dynamo.reset()
            calls, peak_mb = _calls(case)
            timings = []
            for direction, call in calls.items():
                ms, low, high = _milliseconds(call, case.device)
                timings.append(case.timing(direction, ms, low=low, high=high, peak_mb=peak_mb))
            return timings
        except (RuntimeError, InputError, torch._dynamo.exc.TorchDynamoException) as error:
            if case.variant not in _MAY_FAIL:
                raise
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return [case.timing(direction, None, why=why) for direction in DIRECTIONS]


def _why_not(case: _Case) -> str | None:
    """Return why a variant cannot be timed on this device. None: it can."""
    on_gpu = case.device.type == "cuda"
    if case.variant in (FUSED, KERNEL):
        reason = obstacle()
        if reason is None and not on_gpu:
            reason = "there is no NVIDIA GPU here, and the interpreter is not timed"
        return reason
    if case.variant == FLEX and not on_gpu:
        return "FlexAttention has no backward on a CPU"
    return None


def _calls(case: _Case) -> tuple[dict[str, Callable[[], Any]], float | None]:
    """Return a function without arguments per direction, and on a GPU the peak memory in MB."""
    attend, inputs, weights = _operands(case)
    leaves = [x for x in (*inputs, *weights) if x.requires_grad]

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast(case.device.type, case.dtype, enabled=case.dtype != torch.float32):
            return attend(*inputs)

    gradients = [torch.randn_like(x) for x in forward()]

    def backward(outputs: tuple[Tensor, Tensor]) -> Any:
        return torch.autograd.grad(
            outputs, leaves, grad_outputs=gradients, retain_graph=True, allow_unused=True
        )

    peak_mb = None
    if case.device.type == "cuda":
        # The first pass compiles and allocates workspaces.
        backward(forward())
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(forward())
        peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6

    outputs = forward()
    calls = {
        "forward": forward,
        "backward": lambda: backward(outputs),
        "both": lambda: backward(forward()),
    }
    return calls, peak_mb


def _milliseconds(call: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Time a call: median, 20th and 80th percentile."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(_captured(call).replay, quantiles=[0.5, 0.2, 0.8]))

    timer = Timer("call()", globals={"call": call})
    seconds = timer.blocked_autorange(min_run_time=0.5).times
    times = sorted(1e3 * value for value in seconds)
    fifth = len(times) // 5
    return statistics.median(times), times[fifth], times[-1 - fifth]


def _own_stream(device: torch.device) -> AbstractContextManager:
    """Run on a stream that is not the default one, which a graph cannot capture.

    Autograd runs backward on the stream of forward.
    """
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        call()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph


def _time_copy(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Copy:
    """Time a copy of pixels [B, P, C]."""
    source = torch.randn(shape, device=device, dtype=dtype)
    target = torch.empty_like(source)
    ms, _, _ = _milliseconds(lambda: target.copy_(source), device)
    gb_per_s = 2 * source.nbytes / ms / 1e6
    return Copy(*shape, ms=ms, gb_per_s=gb_per_s)


# ------------------------------------------------------------------------------------ bytes


def kernel_bytes(
    direction: str, batch: int, pixels: int, channels: int, *, itemsize: int = 2, words: int = WORDS
) -> int:
    """Return the fewest bytes that the kernel can move.

    Forward reads and writes the pixels, and backward also reads the gradient of the output. Each
    moves the word side once.
    """
    pixel_side = batch * pixels * channels * itemsize
    word_side = batch * words * (channels + 1) * 4
    forward = 2 * pixel_side + 3 * word_side
    backward = 3 * pixel_side + 6 * word_side
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def count_gigabytes(
    stages: Sequence[tuple[int, int]] = STAGES, batch: int = 32
) -> dict[str, dict[str, float]]:
    """Count what each eager variant moves over the stages, under bfloat16 autocast.

    Compiled variants are left out: they fuse operators.

    Returns:
        variant -> direction -> 1e9 bytes.
    """
    gigabytes = {}
    for variant in (EAGER, ABSORBED, SDPA, REFERENCE):
        forward = backward = 0.0
        for pixels, channels in stages:
            case = _Case(
                variant=variant,
                batch=batch,
                pixels=pixels,
                channels=channels,
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
            )
            forward_bytes, backward_bytes = _count_bytes(case)
            forward += forward_bytes / 1e9
            backward += backward_bytes / 1e9
        gigabytes[variant] = {"forward": forward, "backward": backward}

    gigabytes[KERNEL] = {}
    for direction in ("forward", "backward"):
        total = sum(kernel_bytes(direction, batch, *stage) for stage in stages)
        gigabytes[KERNEL][direction] = total / 1e9
    return gigabytes


def _count_bytes(case: _Case) -> tuple[int, int]:
    """Count the bytes of forward and backward on fake tensors."""
    with FakeTensorMode(), one_operator_attention():
        attend, inputs, weights = _operands(case)
        with Traffic() as forward, torch.autocast("cpu", torch.bfloat16):
            outputs = attend(*inputs)

        gradients = [torch.empty_like(x) for x in outputs]
        leaves = [x for x in (*inputs, *weights) if x.requires_grad]
        with Traffic() as backward:
            torch.autograd.grad(outputs, leaves, gradients)
    return forward.total.bytes, backward.total.bytes


# ------------------------------------------------------------------------------------ tables


def table(bench: KernelBench) -> str:
    """Format times by stage, ratios over all stages, the kernel's bandwidth, and bytes."""
    sections = [
        f"{bench.device}, torch {bench.torch}, {bench.dtype}, {bench.words} words, "
        f"text width {TEXT_WIDTH}; median ms"
    ]
    for batch in sorted({timing.batch for timing in bench.timings}):
        for direction in DIRECTIONS:
            sections.append(_format_times(bench, batch, direction))
        sections.append(_format_bandwidth(bench, batch))
    sections.append(_format_bytes(bench))
    return "\n\n".join(sections)


def _format_times(bench: KernelBench, batch: int, direction: str) -> str:
    """Format the times of all variants by stage, and why some have none."""
    # The timings of each variant have the same stages in the same order.
    by_variant: dict[str, list[Timing]] = {variant: [] for variant in VARIANTS}
    for timing in bench.timings:
        if timing.batch == batch and timing.direction == direction:
            by_variant[timing.variant].append(timing)
    eager_total = _total_ms(by_variant[EAGER])

    rows, reasons = [], []
    for variant, timings in by_variant.items():
        times = [_format_ms(t.ms) for t in timings]
        total = _total_ms(timings)
        peaks = [t.peak_mb for t in timings if t.peak_mb is not None]

        # The kernel alone does less than the others.
        has_ratio = eager_total and total and variant != KERNEL
        ratio = f"{eager_total / total:.2f}" if has_ratio else ""
        peak = f"{max(peaks):.0f}" if peaks else ""
        rows.append((variant, *times, _format_ms(total), ratio, peak))
        if total is None:
            reasons.append(f"{variant}: {next(t.why for t in timings if t.why)}")

    stages = [f"{t.pixels} x {t.channels}" for t in by_variant[EAGER]]
    headers = [f"batch {batch}, {direction}", *stages, "sum", "eager / it", "peak MB"]
    return "\n".join([format_rows(rows, headers), *reasons])


def _total_ms(timings: Sequence[Timing]) -> float | None:
    """Add up the times of all stages. None: at least one is missing."""
    times = [t.ms for t in timings]
    return None if None in times else sum(times)


def _format_ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"


def _format_bandwidth(bench: KernelBench, batch: int) -> str:
    """Format the bandwidth that the kernel alone achieves, compared with a copy of the pixels.

    It is computed from the fewest bytes that the kernel can move.
    """
    itemsize = 2 if bench.dtype == "bfloat16" else 4
    ms_of = {(t.variant, t.batch, t.pixels, t.direction): t.ms for t in bench.timings}

    rows = []
    for copy in bench.copies:
        if copy.batch != batch:
            continue
        row = [f"{copy.pixels} x {copy.channels}", f"{copy.gb_per_s:,.0f}"]
        for direction in ("forward", "backward"):
            ms = ms_of[KERNEL, batch, copy.pixels, direction]
            size = kernel_bytes(direction, batch, copy.pixels, copy.channels, itemsize=itemsize)
            row.append(_format_rate(size, ms, copy))
        rows.append(row)
    return format_rows(rows, headers=(f"batch {batch}, GB/s", "copy", "forward", "backward"))


def _format_rate(size: int, ms: float | None, copy: Copy) -> str:
    if not ms:
        return "-"
    gb_per_s = size / ms / 1e6
    return f"{gb_per_s:,.0f} ({gb_per_s / copy.gb_per_s:.0%})"


def _format_bytes(bench: KernelBench) -> str:
    """Format the counted bytes, and the time that they take at least."""
    rows = []
    for variant, sizes in bench.gigabytes.items():
        row = [variant]
        for direction in ("forward", "backward"):
            size = sizes[direction]
            row.append(f"{size:.2f} GB {size / BYTES_PER_S * 1e15:>5.0f} us")
        rows.append(row)

    title = (
        "counted bytes of 32 images over the four stages of Swin-B at 480, bfloat16 autocast, "
        f"and their floor at {BYTES_PER_S / 1e12} TB/s"
    )
    return f"{title}\n{format_rows(rows, headers=('', 'forward', 'backward'))}"
