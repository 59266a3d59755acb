"""The fused kernels as a registered operation, and the calls that must not use them.

The operation is compiled, put under autocast, checkpointed and captured in a CUDA graph.
"""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coupalign import kernels
from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention, reference
from coupalign.model.wpa import WordPixelAlignment
from tests.kernels.test_fused import DEVICE, ON_GPU, attend_fused, everything, operands

pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")
pytestmark = pytest.mark.gpu if ON_GPU else []
SMALL = (2, 40, 5, 64, 1)
BACKEND = "inductor" if ON_GPU else "aot_eager"


def leaves(shape: tuple[int, ...] = SMALL, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in operands(shape, dtype)[:4]]


@pytest.fixture
def fused_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine look as if it had a GPU that runs the kernels."""
    kernels._logged_reasons.clear()
    monkeypatch.setattr(kernels, "obstacle", lambda: None)
    monkeypatch.setattr(kernels, "interpreting", lambda: False)


# ------------------------------------------------------------------------------------ the operation


def test_opcheck() -> None:
    operations = torch.ops.coupalign
    inputs = leaves()
    torch.library.opcheck(operations.bidirectional_attention.default, inputs)

    _, from_pixels, log_sum = operations.bidirectional_attention(*inputs)
    grads = [inputs[0], from_pixels]
    saved = [x.detach() for x in (*inputs, from_pixels, log_sum, *grads)]
    torch.library.opcheck(operations.bidirectional_attention_backward.default, saved)


@pytest.mark.parametrize("dynamic", [False, True])
def test_operation_compiles_without_graph_break(dynamic: bool) -> None:
    """With dynamic shapes there is no second compilation for another size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)

    def step(v: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        from_words, from_pixels = bidirectional_attention(v * 1.5, k, u, bias, impl="fused")
        return from_words.relu(), from_pixels.square()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)

    for shape in (SMALL, (3, 50, 6, 64, 1)):
        inputs = operands(shape, torch.float32)
        for a, b in zip(everything(compiled, inputs), everything(step, inputs)):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == (1 if dynamic else 2)


def test_module_compiles_without_graph_break() -> None:
    torch.manual_seed(0)
    module = WordPixelAlignment(64, 32, impl="fused").to(DEVICE)
    pixels = torch.randn(2, 40, 64, device=DEVICE)
    words = torch.randn(2, 5, 32, device=DEVICE)
    word_mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    compiled = torch.compile(module, backend=BACKEND, fullgraph=True)

    got = compiled(pixels, words, word_mask)

    for a, b in zip(got, module(pixels, words, word_mask)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl, heads", [("fused", 1), ("auto", 4)])
def test_module_equals_the_oracle(impl: str, heads: int) -> None:
    """Absorbed projections and fused kernels against the formulas as they are written.

    Both outputs, and the gradient of every weight.
    """
    results = []
    for path in (impl, "plain"):
        torch.manual_seed(0)
        module = WordPixelAlignment(64, 32, heads, path).to(DEVICE)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        pixels = torch.randn(2, 90, 64, device=DEVICE)
        words = torch.randn(2, 5, 32, device=DEVICE)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=DEVICE)

        outputs = module(pixels, words * mask[..., None], mask)
        losses = [x.square().mean() for x in outputs]
        gradients = torch.autograd.grad(losses, list(module.parameters()))
        results.append([*outputs, *gradients])

    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7


def test_autocast_rounds_only_the_pixels() -> None:
    v, k, u, bias = operands(SMALL, torch.float32)[:4]

    with torch.autocast(DEVICE, torch.float16):
        from_words, from_pixels = bidirectional_attention(v, k, u, bias, impl="fused")
        plain = bidirectional_attention(v, k, u, bias, impl="reference")

    assert from_words.dtype == plain[0].dtype == torch.float16
    assert from_pixels.dtype == plain[1].dtype == torch.float32
    want = bidirectional_attention(v.half(), k, u, bias, impl="fused")
    assert torch.equal(from_words, want[0]) and torch.equal(from_pixels, want[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_double_use(reentrant: bool) -> None:
    """The operation is used twice in one graph, and each use is recomputed in backward."""

    def twice(v: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        from_words, from_pixels = attend_fused(v, k, u, bias)
        return attend_fused(v + from_words, k + from_pixels, u, bias)

    def twice_checkpointed(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(twice, *inputs, use_reentrant=reentrant)

    def gradients(attend) -> list[Tensor]:
        inputs = leaves()
        torch.autograd.backward(attend(*inputs), operands(SMALL, torch.float32)[4:])
        return [x.grad for x in inputs]

    for a, b in zip(gradients(twice), gradients(twice_checkpointed)):
        assert torch.equal(a, b)


def test_backward_keeps_nothing_of_the_size_of_the_scores() -> None:
    """Only the pixels themselves and tensors of the words are kept."""
    inputs = leaves((2, 300, 20, 64, 1), torch.float16)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        bidirectional_attention(*inputs, impl="fused")

    large = [x for x in kept if x.numel() >= 300 * 20]
    assert len(large) == 1 and large[0].data_ptr() == inputs[0].data_ptr()
    small = sorted(tuple(x.shape) for x in kept if x.numel() < 300 * 20)
    assert small == [(2, 20)] * 2 + [(2, 20, 64)] * 3


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
def test_cuda_graph_captures_forward_and_backward() -> None:
    inputs = operands((2, 3600, 20, 256, 1), torch.bfloat16)
    want = everything(attend_fused, inputs)  # compiles before the capture
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(attend_fused, inputs)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(attend_fused, inputs)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()

    assert all(torch.equal(a, b) for a, b in zip(want, captured))


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
def test_offsets_beyond_32_bits() -> None:
    """One image has more than 2^31 elements, and its last pixels are as right as the first."""
    pixel_count, channels = (1 << 24) + 77, 128
    v, k, u, bias, grad, _ = operands((1, 111, 20, channels, 1), torch.bfloat16)
    pixels = v.repeat(1, -(-pixel_count // 111), 1)[:, :pixel_count].contiguous().requires_grad_()

    from_words, _ = bidirectional_attention(pixels, k, u, bias, impl="fused")
    expected, _ = bidirectional_attention(v, k, u, bias, impl="fused")
    last = torch.arange(pixel_count - 200, pixel_count, device=DEVICE)
    assert torch.equal(from_words[0, last], expected[0, last % 111])

    from_words.backward(grad[:, :1].expand_as(from_words).contiguous())
    tail = pixels.grad[0, last]
    assert tail.isfinite().all() and torch.equal(tail, pixels.grad[0, last - 111 * 100])


# ------------------------------------------------------------------- calls that take the reference


@pytest.mark.parametrize(
    "shape, reason",
    [((1, 8, 65, 16, 1), "64 words, not 65"), ((1, 8, 4, 2064, 1), "2048 channels, not 2064")],
)
def test_unsupported_shape_takes_the_reference_and_logs_once(
    shape: tuple[int, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._logged_reasons.clear()
    inputs = operands(shape, torch.float32)[:4]

    with caplog.at_level(logging.WARNING, "coupalign.kernels"):
        got = bidirectional_attention(*inputs, impl="fused")
        bidirectional_attention(*inputs, impl="fused")

    for a, b in zip(got, reference.bidirectional_attention(*inputs)):
        assert torch.equal(a, b)
    assert len(caplog.records) == 1 and reason in caplog.text


@pytest.mark.parametrize("shape", [(1, 90, 20, 96, 2), (1, 50, 5, 24, 3), (1, 70, 40, 256, 4)])
def test_auto_takes_the_reference_for_several_heads(
    shape: tuple[int, ...], fused_by_default: None
) -> None:
    heads = shape[-1]
    inputs = operands(shape, torch.float16)[:4]
    assert kernels.choose("auto") == "fused"

    assert kernels.choose("auto", heads) == "reference"
    description = kernels.describe_choice("auto", heads)
    assert description == f"plain PyTorch (the fused kernels compute one head, not {heads})"
    got = bidirectional_attention(*inputs, heads=heads)
    for a, b in zip(got, reference.bidirectional_attention(*inputs, heads)):
        assert torch.equal(a, b)


def test_fused_with_several_heads_is_refused() -> None:
    inputs = operands((1, 8, 4, 20, 5), torch.float32)[:4]
    message = "wpa.impl = fused: the fused kernels compute one head, not 5; use auto or reference"

    with pytest.raises(InputError, match=message):
        bidirectional_attention(*inputs, impl="fused", heads=5)
    with pytest.raises(InputError, match=message):
        WordPixelAlignment(20, 20, heads=5, impl="fused")


def test_tensors_on_another_device_are_logged_only_for_fused(
    fused_by_default: None, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = [x.cpu() for x in operands(SMALL, torch.float32)[:4]]

    with caplog.at_level(logging.WARNING, "coupalign.kernels"):
        for impl in ("auto", "fused", "fused"):
            bidirectional_attention(*inputs, impl=impl)
            bidirectional_attention(*[x.to("meta") for x in inputs], impl=impl)

    messages = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert messages == ["the tensors are on cpu"]


def test_float64_takes_the_reference() -> None:
    inputs = [x.double() for x in operands(SMALL, torch.float32)[:4]]

    from_words, _ = bidirectional_attention(*inputs, impl="fused")

    assert from_words.dtype == torch.float64


@pytest.mark.parametrize("pixels, words", [(0, 3), (3, 0)])
def test_empty_inputs(pixels: int, words: int) -> None:
    sizes = ((2, pixels, 8), (2, words, 8), (2, words, 8), (2, words))
    empty = [torch.zeros(size, device=DEVICE) for size in sizes]

    got = bidirectional_attention(*empty, impl="fused")

    assert [tuple(x.shape) for x in got] == [(2, pixels, 8), (2, words, 8)]
    assert not any(x.any() for x in got)


# ------------------------------------------------------------------------ machines without kernels


def test_auto_works_without_triton_and_fused_is_refused() -> None:
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None

import torch
from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention, choose, describe_choice

assert choose("auto") == "reference"
assert "Triton is not installed" in describe_choice("auto")
words = torch.randn(1, 3, 8)
bidirectional_attention(torch.randn(1, 9, 8), words, words, torch.zeros(1, 3))
try:
    choose("fused")
except InputError as error:
    assert "Triton is not installed" in str(error)
else:
    raise SystemExit("fused was accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_fused_is_refused_without_gpu_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    assert kernels.choose("auto") == "reference"
    with pytest.raises(
        InputError, match="wpa.impl = fused: there is no NVIDIA GPU here; use auto or reference"
    ):
        kernels.choose("fused")
