"""LAVT's attention and gate against docs/method.md, element by element."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from coupalign.model.baselines.lavt import LanguageGate, PixelWordAttention


def attend_slowly(
    attention: PixelWordAttention, pixels: Tensor, words: Tensor, word_mask: Tensor
) -> Tensor:
    """Follow the text of docs/method.md, one sample, pixel and word at a time."""

    def linear(layer, x):
        return layer.weight @ x + layer.bias

    def instance_norm(columns):  # [C, P], over the pixels
        mean = columns.mean(1, keepdim=True)
        variance = (columns - mean).square().mean(1, keepdim=True)
        return (columns - mean) / (variance + 1e-5).sqrt()

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    out = torch.zeros_like(pixels)
    for sample in range(len(pixels)):
        real = [t for t in range(words.shape[1]) if word_mask[sample, t]]
        keys = [linear(attention.key, words[sample, t]) for t in real]
        values = [linear(attention.value, words[sample, t]) for t in real]
        queries = [linear(attention.query, pixel) for pixel in pixels[sample]]
        queries = instance_norm(torch.stack(queries, 1))  # [C, P]

        # Every pixel reads the real words.
        read = []
        for p in range(pixels.shape[1]):
            products = [(queries[:, p] * key).sum() / math.sqrt(pixels.shape[2]) for key in keys]
            scores = torch.stack(products).exp()
            weights = scores / scores.sum()
            read.append(sum(weight * value for weight, value in zip(weights, values)))

        # The message is multiplied into the pixel.
        messages = [linear(attention.out, each) for each in read]
        messages = instance_norm(torch.stack(messages, 1))  # [C, P]
        for p in range(pixels.shape[1]):
            product = gelu(linear(attention.project, pixels[sample, p])) * messages[:, p]
            out[sample, p] = gelu(linear(attention.mix, product))
    return out


@torch.no_grad()
def test_pixel_word_attention_equals_its_description():
    torch.manual_seed(0)
    attention = PixelWordAttention(channels=6, word_width=5)
    pixels, words = torch.randn(2, 12, 6), 3 * torch.randn(2, 4, 5)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])

    slow = attend_slowly(attention.double(), pixels.double(), words.double(), mask)
    fast = attention.float()(pixels, words * mask[..., None], mask)

    assert slow.std() > 0.01
    torch.testing.assert_close(fast.double(), slow, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_language_gate_equals_its_description():
    torch.manual_seed(0)
    gate = LanguageGate(3)
    pixels, message = torch.randn(1, 2, 2, 3), 3 * torch.randn(1, 2, 2, 3)
    first, last = gate.gate[0].weight, gate.gate[2].weight

    actual = gate(pixels, message)

    for y, x in itertools.product(range(2), range(2)):
        v, f = pixels[0, y, x], message[0, y, x]
        expected = v + torch.tanh(last @ (first @ f).clamp(min=0)) * f
        torch.testing.assert_close(actual[0, y, x], expected)
