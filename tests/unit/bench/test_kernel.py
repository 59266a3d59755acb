"""`coupalign bench kernel`: all variants compute the same, and bytes are those of the operands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.bench import kernel
from coupalign.cli.parser import main
from coupalign.costs.traffic import Traffic


def random_inputs(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [B, 40, 32], words [B, 6, D] and their mask, with up to three lengths."""
    v = torch.randn(batch, 40, 32, device=device)
    words = torch.randn(batch, 6, kernel.TEXT_WIDTH, device=device)
    lengths = torch.tensor([[6], [2], [1]], device=device)[:batch]
    return v, words, torch.arange(6, device=device) < lengths


@pytest.mark.parametrize("name", [kernel.EAGER, kernel.ABSORBED, kernel.SDPA, kernel.FUSED])
def test_variant_equals_plain_alignment(name: str) -> None:
    if name == kernel.FUSED:
        pytest.importorskip("triton", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    inputs = random_inputs(3, device)
    attend, _ = kernel.build_variant(name, 32, device)
    oracle, module = kernel.build_variant(kernel.REFERENCE, 32, device)
    module.impl = "plain"

    messages, expected = attend(*inputs), oracle(*inputs)

    for got, want in zip(messages, expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_flex_attention_equals_reference() -> None:
    """Only its forward pass runs on a CPU, and only uncompiled."""
    v, words, mask = random_inputs(2)
    _, module = kernel.build_variant(kernel.REFERENCE, 32, "cpu")

    with torch.no_grad():
        messages = kernel._attend_two_flex(module, v, words, mask)
        expected = module.attend(v, words, mask)

    for got, want in zip(messages, expected):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_kernel_bytes_are_those_of_its_operands() -> None:
    fused = pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")
    shape = batch, pixels, channels = 4, 100, 64
    with FakeTensorMode():
        v = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        keys = torch.empty(batch, kernel.WORDS, channels, requires_grad=True)
        values = torch.empty(batch, kernel.WORDS, channels, requires_grad=True)
        bias = torch.empty(batch, kernel.WORDS, requires_grad=True)
        with Traffic() as forward:
            outputs = fused.bidirectional_attention(v, keys, values, bias)
        gradients = [torch.empty_like(x) for x in outputs]
        with Traffic() as backward:
            torch.autograd.grad(outputs, [v, keys, values, bias], gradients)

    # The formula counts bias and log-sum as one channel.
    forward_bytes = kernel.kernel_bytes("forward", *shape)
    backward_bytes = kernel.kernel_bytes("backward", *shape)
    assert forward.total.bytes == pytest.approx(forward_bytes, rel=0.05)
    assert backward.total.bytes == pytest.approx(backward_bytes, rel=0.05)
    assert kernel.kernel_bytes("both", *shape) == forward_bytes + backward_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times all variants")
def test_variants_without_a_time_have_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = {kernel.EAGER, kernel.REFERENCE}
    variants = (kernel.EAGER, kernel.REFERENCE, kernel.FLEX, kernel.FUSED, kernel.KERNEL)
    small_stages = ((50, 32), (20, 64))
    monkeypatch.setattr(kernel, "VARIANTS", variants)
    monkeypatch.setattr(kernel.bench_kernel, "__defaults__", (None, small_stages))

    assert main(["bench", "kernel", "--batch", "1", "--json"]) == 0

    *lines, last = capsys.readouterr().out.splitlines()
    table, result = "\n".join(lines), json.loads(last)
    timings = result["timings"]
    assert len(timings) == 5 * 2 * 3
    assert {t["variant"] for t in timings if t["ms"]} == timed
    assert all(t["low"] <= t["ms"] <= t["high"] for t in timings if t["ms"])

    assert "there is no NVIDIA GPU here" in table
    assert "no backward on a CPU" in table
    assert "batch 1, backward" in table
    assert result["copies"][0]["gb_per_s"] > 0
    assert set(result["gigabytes"]) >= {kernel.EAGER, kernel.KERNEL}


def test_benchmark_runs_in_a_new_process() -> None:
    """Parts of torch that other tests have imported are not there."""
    script = (
        "from coupalign.bench import kernel\n"
        "kernel.VARIANTS = (kernel.EAGER,)\n"
        "kernel.bench_kernel((1,), ((20, 16),))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["traffic"], "traffic need a configuration"),
        (["kernel", "configs/demo.yaml"], "the other benches take none"),
        (["kernel", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
