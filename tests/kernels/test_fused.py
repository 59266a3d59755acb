"""The fused kernels against float64: on a GPU where there is one, else in Triton's interpreter.

The tolerance is not chosen: a kernel may be wrong by twice what eager PyTorch is wrong by in the same type, both
measured against float64 on the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from coupalign.kernels import bidirectional_attention, plan, reference

fused = pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = (
    pytest.mark.gpu if ON_GPU else []
)  # with a GPU these tests need it: `-m gpu` selects them there
bf16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(not ON_GPU, reason="the interpreter gets bfloat16 wrong"),
)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), bf16]
NAMES = (
    "pixels_from_words",
    "words_from_pixels",
    "grad pixels",
    "grad keys",
    "grad values",
    "grad bias",
)
SHAPES = [  # B, P, T, C, H: every backbone's widths, no multiple of a tile among P, all paths of the plan
    (2, 111, 7, 96, 1),
    (1, 300, 20, 128, 1),
    (1, 63, 20, 192, 1),
    (3, 130, 1, 256, 1),
    (1, 65, 32, 384, 1),
    (1, 225, 20, 512, 1),
    (1, 63, 16, 768, 1),
    (1, 111, 20, 1024, 1),
    (1, 70, 9, 1536, 1),
    (1, 30, 20, 2048, 1),
    (2, 100, 64, 128, 1),
    (1, 90, 20, 96, 2),
    (1, 50, 5, 24, 3),
    (1, 70, 40, 256, 4),
    (1, 1, 1, 16, 1),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes would give every program one tile; with few programs they walk over several, as large ones do."""
    monkeypatch.setattr(plan, "PROGRAMS", 3)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, padding: str = "some", logits: float = 2.0
) -> list[Tensor]:
    """pixels in `dtype`, keys, values and bias in float32, and a gradient for each output."""
    batch, pixels, words, channels, heads = shape
    generator = torch.Generator().manual_seed(pixels + channels)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    bias = draw(batch, heads, words)
    if padding == "some" and words > 1:
        bias[0, :, words - words // 3 - 1 :] = -torch.inf
    if padding == "all":
        bias[-1] = -torch.inf
    v, k, u = (
        draw(batch, pixels, channels),
        draw(batch, heads * words, channels),
        draw(batch, heads * words, channels),
    )
    made = [
        v,
        k * logits / channels**0.5,
        u,
        bias.flatten(1),
        draw(batch, pixels, channels),
        draw(batch, heads * words, channels),
    ]
    types = [dtype, *[torch.float32] * 3, dtype, torch.float32]
    return [x.to(DEVICE, kind) for x, kind in zip(made, types)]


def everything(
    attend: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """Both outputs and all four gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    outputs = attend(*leaves)
    return *[x.detach() for x in outputs], *torch.autograd.grad(outputs, leaves, inputs[4:])


def through(heads: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *inputs: bidirectional_attention(*inputs, impl="fused", heads=heads)


def eager(heads: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """As autocast runs it: matrix products in `dtype`, softmax in float32."""

    def attend(v: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        bias, padding = reference.finite_bias(bias)
        scores = (v @ k.to(dtype).transpose(1, 2)).float() + bias[:, None]
        over_words = scores.unflatten(2, (heads, -1)).softmax(-1).flatten(2).to(dtype)
        over_pixels = scores.softmax(1).to(dtype).transpose(1, 2)
        from_words = (over_words @ u.to(dtype)).masked_fill(padding.all(1)[:, None, None], 0.0)
        return from_words, (over_pixels @ v).masked_fill(padding[..., None], 0.0).float()

    return attend


def truth(inputs: list[Tensor], heads: int) -> tuple[Tensor, ...]:
    return everything(
        lambda *x: reference.bidirectional_attention(*x, heads), [x.double() for x in inputs]
    )


def assert_twice_eager(got: tuple[Tensor, ...], inputs: list[Tensor], heads: int) -> None:
    """Root mean square and largest error of each result. One rounding of the largest value is granted on top: where
    eager happens to be exact, twice its error is nothing."""
    dtype = inputs[0].dtype
    plain, exact = everything(eager(heads, dtype), inputs), truth(inputs, heads)
    largest = [x.abs().max().item() for x in (inputs[0], *inputs[4:])]
    terms = max(1.0, largest[0]) * max(
        largest[1:]
    )  # what keys and bias get is a sum that may cancel to nothing
    for name, ours, theirs, want in zip(NAMES, got, plain, exact):
        assert ours.isfinite().all(), name
        unit = torch.finfo(dtype).eps * max(
            want.abs().max().item(), terms if name in ("grad keys", "grad bias") else 0.0
        )
        for measure in (lambda x: x.square().mean().sqrt().item(), lambda x: x.abs().max().item()):
            error, allowed = (
                measure(ours.double() - want),
                2 * measure(theirs.double() - want) + unit,
            )
            assert error <= allowed, (
                f"{name}: {error:.2e} is more than twice eager's error, {allowed:.2e}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_no_worse_than_twice_eager(
    shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype)
    assert_twice_eager(everything(through(shape[-1]), inputs), inputs, shape[-1])


@pytest.mark.parametrize("padding", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 111, 7, 96, 1), (2, 70, 20, 320, 2)], ids=["narrow", "wide"])
def test_without_padding_and_without_words(
    shape: tuple[int, ...], dtype: torch.dtype, padding: str, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype, padding)
    got = everything(through(shape[-1]), inputs)
    assert_twice_eager(got, inputs, shape[-1])
    if padding == "all":
        assert not any(x[-1].any() for x in got), (
            "an image without words gives zeros, and zero gradients"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 111, 7, 96, 1), (2, 70, 20, 320, 1)], ids=["narrow", "wide"])
def test_large_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scores of several thousands: both softmaxes pick one entry, nothing overflows, and no clamp is needed."""
    inputs = operands(shape, dtype, logits=2000.0)
    got = everything(through(shape[-1]), inputs)
    exact = truth([x.to(dtype) if place in (1, 2) else x for place, x in enumerate(inputs)], 1)
    for name, ours, want in zip(NAMES[:2], got, exact):
        close = (ours.double() - want).abs() <= 1e-2 * want.abs().max()
        assert close.double().mean() > 0.95, (
            name
        )  # where two scores are nearly equal, rounding may pick the other
    assert all(x.isfinite().all() for x in got)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in cast:RuntimeWarning"
)  # the gradient of float16 pixels may
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-12, 20])
def test_the_scale_of_the_word_gradient_does_not_matter(power: int, dtype: torch.dtype) -> None:
    """A loss scale is a power of two: gradients that are float32 change by exactly that, beyond float16's range as well."""
    *inputs, from_words, from_pixels = operands((1, 111, 7, 96, 1), dtype)
    nothing = torch.zeros_like(from_words)
    one = everything(through(1), [*inputs, nothing, from_pixels])
    scaled = everything(through(1), [*inputs, nothing, from_pixels * 2.0**power])
    assert all(torch.equal(a * 2.0**power, b) for a, b in zip(one[3:], scaled[3:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 300, 20, 128, 1), (1, 130, 20, 320, 1)], ids=["narrow", "wide"]
)
def test_repeats_are_equal_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype)
    first = everything(through(1), inputs)
    for _ in range(100 if ON_GPU else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(through(1), inputs)))


@pytest.mark.parametrize("shape", [(2, 111, 7, 96, 1), (2, 70, 20, 320, 1)], ids=["narrow", "wide"])
def test_nothing_outside_the_inputs_is_read(shape: tuple[int, ...]) -> None:
    """Every input lies between two stretches of NaN."""
    inputs = operands(shape, torch.float16)
    fenced = []
    for x in inputs:
        whole = x.new_full((x.numel() + 8192,), torch.nan)
        inside = whole[4096:-4096].view_as(x)
        fenced.append(inside.copy_(x))
    for a, b in zip(everything(through(1), inputs), everything(through(1), fenced)):
        assert torch.equal(a, b)


def test_strided_inputs_and_a_single_output() -> None:
    inputs = operands((2, 63, 7, 64, 1), torch.float32)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    assert not strided[0].is_contiguous()
    want = everything(through(1), inputs)
    assert all(torch.equal(a, b) for a, b in zip(want, everything(through(1), strided)))
    leaves = [x.requires_grad_() for x in inputs[:4]]
    for place in (0, 1):
        output = bidirectional_attention(*leaves, impl="fused")[place]
        got = torch.autograd.grad(output, leaves, inputs[4 + place])
        exact = torch.autograd.grad(
            reference.bidirectional_attention(*leaves)[place],
            leaves,
            inputs[4 + place],
            materialize_grads=True,
        )
        for a, b in zip(got, exact):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
