"""Every rival computes the same thing, the bytes of the kernel are those of its operands, and the tables hold what was measured."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coupalign.bench import kernel
from coupalign.cli.parser import main
from coupalign.costs.traffic import Traffic


@pytest.mark.parametrize("name", [kernel.EAGER, kernel.ABSORBED, kernel.SDPA, kernel.FUSED])
def test_the_variants_agree(name: str) -> None:
    if name == kernel.FUSED:
        pytest.importorskip("triton", reason="Triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    v, words = (
        torch.randn(3, 40, 32, device=device),
        torch.randn(3, 6, kernel.TEXT_WIDTH, device=device),
    )
    mask = torch.arange(6, device=device) < torch.tensor([[6], [2], [1]], device=device)
    attend, _ = kernel.variant_of(name, 32, device)
    oracle, module = kernel.variant_of(kernel.REFERENCE, 32, device)
    module.impl = "plain"
    for got, want in zip(attend(v, words, mask), oracle(v, words, mask)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_flex_attention_agrees() -> None:
    """Its forward runs on a CPU, uncompiled."""
    v, words, mask = (
        torch.randn(2, 40, 32),
        torch.randn(2, 6, kernel.TEXT_WIDTH),
        torch.arange(6) < torch.tensor([[6], [2]]),
    )
    _, module = kernel.variant_of(kernel.REFERENCE, 32, "cpu")
    with torch.no_grad():
        for got, want in zip(
            kernel._two_flex(module, v, words, mask), module.attend(v, words, mask)
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_bytes_of_the_kernel_are_its_operands() -> None:
    fused = pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")
    batch, pixels, channels, words = 4, 100, 64, kernel.WORDS
    with FakeTensorMode():
        v = torch.empty(batch, pixels, channels, dtype=torch.bfloat16, requires_grad=True)
        k, u = (torch.empty(batch, words, channels, requires_grad=True) for _ in range(2))
        bias = torch.empty(batch, words, requires_grad=True)
        with Traffic() as forward:
            outputs = fused.bidirectional_attention(v, k, u, bias)
        gradients = [torch.empty_like(x) for x in outputs]
        with Traffic() as backward:
            torch.autograd.grad(outputs, [v, k, u, bias], gradients)
    for direction, traffic in (("forward", forward), ("backward", backward)):
        least = kernel.kernel_bytes(direction, batch, pixels, channels)
        assert traffic.total.bytes == pytest.approx(least, rel=0.05), (
            "the formula counts bias and log-sum as one channel"
        )
    assert kernel.kernel_bytes("both", 4, 100, 64) == sum(
        kernel.kernel_bytes(d, 4, 100, 64) for d in ("forward", "backward")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times all variants")
def test_the_verb_times_what_runs_here_and_says_why_the_rest_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        kernel,
        "VARIANTS",
        (kernel.EAGER, kernel.REFERENCE, kernel.FLEX, kernel.FUSED, kernel.KERNEL),
    )
    monkeypatch.setattr(kernel.bench_kernel, "__defaults__", (None, ((50, 32), (20, 64))))
    assert main(["bench", "kernel", "--batch", "1", "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    timed = {t["variant"] for t in found["timings"] if t["ms"]}
    assert timed == {kernel.EAGER, kernel.REFERENCE} and len(found["timings"]) == 5 * 2 * 3
    assert all(t["low"] <= t["ms"] <= t["high"] for t in found["timings"] if t["ms"])
    text = "\n".join(shown)
    assert (
        "there is no NVIDIA GPU here" in text
        and "no backward on a CPU" in text
        and "batch 1, backward" in text
    )
    assert found["copies"][0]["gb_per_s"] > 0 and set(found["gigabytes"]) >= {
        kernel.EAGER,
        kernel.KERNEL,
    }


@pytest.mark.parametrize(
    "words, message",
    [
        (["traffic"], "traffic need a configuration"),
        (["kernel", "configs/demo.yaml"], "the other benches take none"),
        (["kernel", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
