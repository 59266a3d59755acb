"""The fused kernels against float64: on a GPU if there is one, else in Triton's interpreter.

The tolerance is not a free choice. A kernel's error may be twice that of eager PyTorch in the same
type. Both are measured against float64 on the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from coupalign.kernels import bidirectional_attention, plan, reference

fused = pytest.importorskip("coupalign.kernels.fused", reason="Triton is not installed")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Where there is a GPU these tests need it, so `-m gpu` selects them.
pytestmark = pytest.mark.gpu if ON_GPU else []

needs_gpu_for_bf16 = pytest.mark.skipif(
    not ON_GPU, reason="the interpreter multiplies bfloat16 wrongly"
)
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=needs_gpu_for_bf16),
]
RESULTS = (
    "pixels_from_words",
    "words_from_pixels",
    "grad pixels",
    "grad keys",
    "grad values",
    "grad bias",
)

# B, P, T, C, H: the widths of every backbone, numbers of pixels that are no multiple of a tile,
# and all paths of the plan.
SHAPES = [
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
    (1, 90, 20, 96, 1),
    (1, 50, 5, 24, 1),
    (1, 70, 40, 256, 1),
    (1, 1, 1, 16, 1),
]
NARROW, WIDE = (2, 111, 7, 96, 1), (2, 70, 20, 320, 1)
narrow_and_wide = pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["narrow", "wide"])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the programs, so that each walks over several tiles although the shapes are small."""
    monkeypatch.setattr(plan, "PROGRAMS", 3)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let torch.empty return NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, padding: str = "some", logits: float = 2.0
) -> list[Tensor]:
    """Draw pixels in `dtype`, keys, values and bias in float32, and a gradient for each output."""
    batch, pixels, words, channels, heads = shape
    generator = torch.Generator().manual_seed(pixels + channels)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    bias = draw(batch, heads, words)
    if padding == "some" and words > 1:
        bias[0, :, words - words // 3 - 1 :] = -torch.inf
    if padding == "all":
        bias[-1] = -torch.inf

    v = draw(batch, pixels, channels)
    k = draw(batch, heads * words, channels) * logits / channels**0.5
    u = draw(batch, heads * words, channels)
    grad_from_words = draw(batch, pixels, channels)
    grad_from_pixels = draw(batch, heads * words, channels)

    return [
        v.to(DEVICE, dtype),
        k.to(DEVICE, torch.float32),
        u.to(DEVICE, torch.float32),
        bias.flatten(1).to(DEVICE, torch.float32),
        grad_from_words.to(DEVICE, dtype),
        grad_from_pixels.to(DEVICE, torch.float32),
    ]


def everything(attend: Attend, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute both outputs and all four gradients; see RESULTS."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    outputs = attend(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, inputs[4:])
    return *[x.detach() for x in outputs], *gradients


def attend_fused(v: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return bidirectional_attention(v, k, u, bias, impl="fused")


def attend_eager(v: Tensor, k: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attend as under autocast: matrix products in the type of the pixels, softmax in float32."""
    dtype = v.dtype
    bias, padding = reference.finite_bias(bias)
    scores = (v @ k.to(dtype).transpose(1, 2)).float() + bias[:, None]
    over_words = scores.softmax(-1).to(dtype)
    over_pixels = scores.softmax(1).to(dtype).transpose(1, 2)

    without_words = padding.all(1)[:, None, None]
    from_words = (over_words @ u.to(dtype)).masked_fill(without_words, 0.0)
    from_pixels = (over_pixels @ v).masked_fill(padding[..., None], 0.0).float()
    return from_words, from_pixels


def exact_results(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute everything in float64."""
    return everything(reference.bidirectional_attention, [x.double() for x in inputs])


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def largest_term(inputs: list[Tensor]) -> float:
    """Bound the terms of the sums that the gradients are."""
    v, *_, grad_from_words, grad_from_pixels = inputs
    largest_gradient = max(largest(grad_from_words), largest(grad_from_pixels))
    return max(1.0, largest(v)) * largest_gradient


def assert_twice_eager(got: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Compare the error of each result with eager's, by root mean square and by the largest.

    One rounding of the largest value is allowed on top: if eager happens to be exact, twice its
    error is nothing.
    """
    rounding = torch.finfo(inputs[0].dtype).eps
    eager, exact = everything(attend_eager, inputs), exact_results(inputs)

    # The gradients of keys and bias are sums that may cancel: their rounding is that of the terms.
    term = largest_term(inputs)

    for name, ours, theirs, want in zip(RESULTS, got, eager, exact):
        assert ours.isfinite().all(), name
        scale = largest(want)
        if name in ("grad keys", "grad bias"):
            scale = max(scale, term)

        for measure in (root_mean_square, largest):
            error = measure(ours.double() - want)
            allowed = 2 * measure(theirs.double() - want) + rounding * scale
            message = f"{name}: {error:.2e} is more than twice eager's error, {allowed:.2e}"
            assert error <= allowed, message


def test_eager_measure_is_the_reference() -> None:
    """The yardstick of the other tests computes the right thing."""
    inputs = operands(NARROW, torch.float32)
    _, pixels, words, channels, _ = NARROW

    # A sum of n terms is off by at most n roundings of the largest, in whatever order a CPU adds.
    longest_sum = max(pixels, words, channels)
    allowed = longest_sum * torch.finfo(torch.float32).eps * largest_term(inputs)

    for got, want in zip(everything(attend_eager, inputs), exact_results(inputs)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_error_is_at_most_twice_eager(
    shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype)

    assert_twice_eager(everything(attend_fused, inputs), inputs)


@pytest.mark.parametrize("padding", ["none", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@narrow_and_wide
def test_no_padding_and_image_without_words(
    shape: tuple[int, ...], dtype: torch.dtype, padding: str, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype, padding)

    got = everything(attend_fused, inputs)

    assert_twice_eager(got, inputs)
    if padding == "all":
        # The last image has no words: zeros, and zero gradients.
        assert not any(x[-1].any() for x in got)


@pytest.mark.parametrize("dtype", DTYPES)
@narrow_and_wide
def test_large_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With scores of several thousands both softmaxes pick one entry, and nothing overflows."""
    v, k, u, *others = operands(shape, dtype, logits=2000.0)

    got = everything(attend_fused, [v, k, u, *others])
    exact = exact_results([v, k.to(dtype), u.to(dtype), *others])

    for name, ours, want in zip(RESULTS[:2], got, exact):
        # Where two scores are nearly equal, rounding may pick the other.
        close = (ours.double() - want).abs() <= 1e-2 * want.abs().max()
        assert close.double().mean() > 0.95, name
    assert all(x.isfinite().all() for x in got)


# The gradient of float16 pixels may overflow.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-12, 20])
def test_scaling_the_word_gradient_scales_the_results_exactly(
    power: int, dtype: torch.dtype
) -> None:
    """A loss scale is a power of two: float32 gradients change by exactly that factor.

    This holds beyond the range of float16 too.
    """
    *inputs, from_words, from_pixels = operands(NARROW, dtype)
    inputs.append(torch.zeros_like(from_words))

    once = everything(attend_fused, [*inputs, from_pixels])
    scaled = everything(attend_fused, [*inputs, from_pixels * 2.0**power])

    assert all(torch.equal(a * 2.0**power, b) for a, b in zip(once[3:], scaled[3:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 300, 20, 128, 1), (1, 130, 20, 320, 1)], ids=["narrow", "wide"]
)
def test_repeats_are_equal_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory: None
) -> None:
    inputs = operands(shape, dtype)
    first = everything(attend_fused, inputs)

    for _ in range(100 if ON_GPU else 2):
        again = everything(attend_fused, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@narrow_and_wide
def test_nothing_outside_the_inputs_is_read(shape: tuple[int, ...]) -> None:
    """Every input is in the middle of a longer tensor of NaN."""
    inputs = operands(shape, torch.float16)
    fenced = []
    for x in inputs:
        whole = x.new_full((x.numel() + 8192,), torch.nan)
        middle = whole[4096:-4096].view_as(x)
        fenced.append(middle.copy_(x))

    got = everything(attend_fused, fenced)

    for a, b in zip(everything(attend_fused, inputs), got):
        assert torch.equal(a, b)


def test_strided_inputs() -> None:
    inputs = operands((2, 63, 7, 64, 1), torch.float32)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs]
    assert not strided[0].is_contiguous()

    got = everything(attend_fused, strided)

    assert all(torch.equal(a, b) for a, b in zip(everything(attend_fused, inputs), got))


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_a_single_output(used: int) -> None:
    inputs = operands((2, 63, 7, 64, 1), torch.float32)
    leaves = [x.requires_grad_() for x in inputs[:4]]
    upstream = inputs[4 + used]

    got = torch.autograd.grad(attend_fused(*leaves)[used], leaves, upstream)

    output = reference.bidirectional_attention(*leaves)[used]
    want = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
