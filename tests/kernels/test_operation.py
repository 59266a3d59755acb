"""The fused kernels as a registered operation: compiled, under autocast, checkpointed, captured; and when they are not used."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coupalign import kernels
from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention, reference
from coupalign.model.wpa import WordPixelAlignment
from tests.kernels.test_fused import DEVICE, ON_GPU, everything, operands, through

pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")
pytestmark = pytest.mark.gpu if ON_GPU else []
SMALL = (2, 40, 5, 64, 1)
BACKEND = "inductor" if ON_GPU else "aot_eager"


def leaves(
    shape: tuple[int, ...] = SMALL, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in operands(shape, dtype)[:4]]


def test_opcheck() -> None:
    inputs = leaves()
    torch.library.opcheck(torch.ops.coupalign.bidirectional_attention.default, (*inputs, 1))
    _, from_pixels, log_sum = torch.ops.coupalign.bidirectional_attention(*inputs, 1)
    saved = [x.detach() for x in (*inputs, from_pixels, log_sum, inputs[0], from_pixels)]
    torch.library.opcheck(torch.ops.coupalign.bidirectional_attention_backward.default, (*saved, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    """No graph break, and with dynamic shapes no second compilation for another size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)

    def step(v, k, u, bias):
        from_words, from_pixels = bidirectional_attention(v * 1.5, k, u, bias, impl="fused")
        return from_words.relu(), from_pixels.square()

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    for shape in (SMALL, (3, 50, 6, 64, 1)):
        inputs = operands(shape, torch.float32)
        for a, b in zip(everything(compiled, inputs), everything(step, inputs)):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == (1 if dynamic else 2)


def test_the_module_compiles_whole() -> None:
    torch.manual_seed(0)
    module = WordPixelAlignment(64, 32, impl="fused").to(DEVICE)
    inputs = (
        torch.randn(2, 40, 64, device=DEVICE),
        torch.randn(2, 5, 32, device=DEVICE),
        torch.ones(2, 5, dtype=torch.bool, device=DEVICE),
    )
    for a, b in zip(
        module(*inputs), torch.compile(module, backend=BACKEND, fullgraph=True)(*inputs)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_module_gives_what_the_oracle_gives(heads: int) -> None:
    """Projections absorbed and kernels fused, against the formulas as written; outputs and the gradient of every weight."""
    results = []
    for impl in ("fused", "plain"):
        torch.manual_seed(0)
        module = WordPixelAlignment(64, 32, heads, impl).to(DEVICE)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        v, words = torch.randn(2, 90, 64, device=DEVICE), torch.randn(2, 5, 32, device=DEVICE)
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=DEVICE)
        out = module(v, words * mask[..., None], mask)
        results.append(
            [
                *out,
                *torch.autograd.grad([x.square().mean() for x in out], list(module.parameters())),
            ]
        )
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7


def test_autocast_rounds_the_pixels_and_nothing_else() -> None:
    inputs = operands(SMALL, torch.float32)[:4]
    with torch.autocast(DEVICE, torch.float16):
        from_words, from_pixels = bidirectional_attention(*inputs, impl="fused")
        plain = bidirectional_attention(*inputs, impl="reference")
    assert (
        from_words.dtype == plain[0].dtype == torch.float16
        and from_pixels.dtype == plain[1].dtype == torch.float32
    )
    want = bidirectional_attention(inputs[0].half(), *inputs[1:], impl="fused")
    assert torch.equal(from_words, want[0]) and torch.equal(from_pixels, want[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_double_use(reentrant: bool) -> None:
    """The operation twice in one graph, each recomputed in backward."""

    def twice(v, k, u, bias):
        from_words, from_pixels = bidirectional_attention(v, k, u, bias, impl="fused")
        return bidirectional_attention(v + from_words, k + from_pixels, u, bias, impl="fused")

    def gradients(attend) -> list[torch.Tensor]:
        inputs = leaves()
        torch.autograd.backward(attend(*inputs), operands(SMALL, torch.float32)[4:])
        return [x.grad for x in inputs]

    again = gradients(lambda *x: checkpoint(twice, *x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(gradients(twice), again))


def test_nothing_of_the_size_of_the_scores_is_kept_for_backward() -> None:
    """The pixels themselves, and tensors of the words."""
    inputs = [x.requires_grad_() for x in operands((2, 300, 20, 64, 1), torch.float16)[:4]]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        bidirectional_attention(*inputs, impl="fused")
    large = [x for x in kept if x.numel() >= 300 * 20]
    assert len(large) == 1 and large[0].data_ptr() == inputs[0].data_ptr()
    assert (
        sorted(tuple(x.shape) for x in kept if x.numel() < 300 * 20)
        == [(2, 20), (2, 20)] + [(2, 20, 64)] * 3
    )


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
def test_a_cuda_graph_captures_forward_and_backward() -> None:
    inputs = operands((2, 3600, 20, 256, 1), torch.bfloat16)
    want = everything(through(1), inputs)  # compiled before the capture
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(through(1), inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(through(1), inputs)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(want, captured))


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device here")
def test_offsets_beyond_32_bits() -> None:
    """2^31 and more elements in one image: the last pixels are as right as the first."""
    count, channels = (1 << 24) + 77, 128
    v, k, u, bias, grad, _ = operands((1, 111, 20, channels, 1), torch.bfloat16)
    pixels = v.repeat(1, -(-count // 111), 1)[:, :count].contiguous().requires_grad_()
    from_words, _ = bidirectional_attention(pixels, k, u, bias, impl="fused")
    expected, _ = bidirectional_attention(v, k, u, bias, impl="fused")
    at = torch.arange(count - 200, count, device=DEVICE)
    assert torch.equal(from_words[0, at], expected[0, at % 111])
    from_words.backward(grad[:, :1].expand_as(from_words).contiguous())
    tail = pixels.grad[0, at]
    assert tail.isfinite().all() and torch.equal(tail, pixels.grad[0, at - 111 * 100])


REFUSED = {
    "65 words": (1, 8, 65, 16, 1),
    "5 heads": (1, 8, 4, 20, 5),
    "2064 channels": (1, 8, 4, 2064, 1),
    "float32": (1, 8, 64, 16, 4),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_shape_it_cannot_run_takes_the_reference_and_says_so_once(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._said.clear()
    shape = REFUSED[what]
    inputs = operands(shape, torch.float32)[:4]
    with caplog.at_level(logging.WARNING, "coupalign.kernels"):
        got = [bidirectional_attention(*inputs, impl="fused", heads=shape[-1]) for _ in range(2)][0]
    for a, b in zip(got, reference.bidirectional_attention(*inputs, shape[-1])):
        assert torch.equal(a, b)
    assert len(caplog.records) == 1 and what in caplog.text


def test_tensors_on_another_device_are_told_of_where_fused_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._said.clear()
    monkeypatch.setattr(kernels, "obstacle", lambda: None)
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    inputs = [x.cpu() for x in operands(SMALL, torch.float32)[:4]]
    with caplog.at_level(logging.WARNING, "coupalign.kernels"):
        for impl in ("auto", "fused", "fused"):
            bidirectional_attention(*inputs, impl=impl)
            bidirectional_attention(*[x.to("meta") for x in inputs], impl=impl)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "the tensors are on cpu"
    ]


def test_float64_takes_the_reference() -> None:
    inputs = [x.double() for x in operands(SMALL, torch.float32)[:4]]
    assert bidirectional_attention(*inputs, impl="fused")[0].dtype == torch.float64


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_compute(count: int) -> None:
    empty = [
        torch.zeros(size, device=DEVICE)
        for size in ((2, count, 8), (2, 3 - count, 8), (2, 3 - count, 8), (2, 3 - count))
    ]
    got = bidirectional_attention(*empty, impl="fused")
    assert [tuple(x.shape) for x in got] == [(2, count, 8), (2, 3 - count, 8)] and not any(
        x.any() for x in got
    )


def test_works_without_triton() -> None:
    """`auto` computes, `fused` says what is missing."""
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else found(name, *more)
sys.modules["triton"] = None
import torch
from coupalign.kernels import bidirectional_attention, choose, explain
from coupalign.errors import InputError
assert choose("auto") == "reference" and "Triton is not installed" in explain("auto")
bidirectional_attention(torch.randn(1, 9, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.zeros(1, 3))
try:
    choose("fused")
except InputError as error:
    assert "Triton is not installed" in str(error)
else:
    raise SystemExit("fused was accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU here")
def test_without_a_gpu_and_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernels.choose("auto") == "reference"
    with pytest.raises(
        InputError, match="wpa.impl = fused: there is no NVIDIA GPU here; use auto or reference"
    ):
        kernels.choose("fused")
