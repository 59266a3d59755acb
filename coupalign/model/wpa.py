"""Word-pixel alignment: after an encoder stage, pixels read words and words read pixels.

Shape legend: B batch, P pixels (H*W), T words, C pixel channels, D text width, h heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention, choose
from coupalign.kernels.reference import finite_bias, without_autocast


class WordPixelAlignment(nn.Module):
    """Bidirectional attention with one shared score matrix, and a gated residual on each side.

        S  = (V Wq)(L Wk)^T / sqrt(C / h)
        V^ = softmax_words(S + padding) (L Wl)      V <- V + tanh(MLP_v(V^)) * V^
        L^ = softmax_pixels(S)^T (V Wv)             L <- L + tanh(MLP_l(L^)) * L^

    The pixel-side projections Wq and Wv are absorbed into the word side, which has fewer rows. This
    is exact because softmax rows sum to 1: S = V [(L Wk) Wq^T]^T and A (V Wv + b) = (A V) Wv + b.
    `impl="plain"` keeps them where they are written, as the oracle for tests.

    The last layer of each gate starts at zero, so step 0 leaves the encoders as they were loaded.

    The projections are parameters of this module and not Linear layers, because the absorbed form
    uses the weights themselves. ZeRO stage 3 gathers weights only while their own module runs.

    Args:
        pixel_width: C.
        word_width: D.
        heads: h.
        impl: "plain", or a kernel as in `kernels.choose`.
        update_words: compute L^ too. False saves its parameters where nothing reads the words.

    Raises:
        InputError: the heads do not divide both widths, or `impl` cannot run here.
    """

    def __init__(
        self,
        pixel_width: int,
        word_width: int,
        heads: int = 1,
        impl: str = "auto",
        update_words: bool = True,
    ):
        super().__init__()
        if pixel_width % heads or word_width % heads:
            raise InputError(
                f"model.wpa.heads = {heads} must divide the pixel width {pixel_width} "
                f"and the text width {word_width}"
            )
        if impl != "plain":
            choose(impl, heads)

        self.heads, self.impl, self.update_words = heads, impl, update_words
        self.norm_pixels = nn.LayerNorm(pixel_width)
        self.norm_words = nn.LayerNorm(word_width)

        self.query_weight, self.query_bias = _projection(pixel_width, pixel_width)
        self.key_weight, self.key_bias = _projection(word_width, pixel_width)
        self.word_value_weight, self.word_value_bias = _projection(word_width, pixel_width)
        self.gate_pixels = _gate(pixel_width)

        if update_words:
            self.pixel_value_weight, self.pixel_value_bias = _projection(pixel_width, word_width)
            self.gate_words = _gate(word_width)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Align one stage.

        Args:
            pixels: [B, P, C].
            words: [B, T, D], zero where padded.
            word_mask: bool [B, T], true at real tokens.

        Returns:
            pixels [B, P, C] and words [B, T, D]; words as given if `update_words` is false.
        """
        pixels_from_words, words_from_pixels = self.attend(
            self.norm_pixels(pixels), self.norm_words(words), word_mask
        )

        message = _gated(self.gate_pixels, pixels_from_words)
        pixels = pixels + message.to(pixels.dtype)

        if self.update_words:
            message = _gated(self.gate_words, words_from_pixels) * word_mask[..., None]
            words = words + message.to(words.dtype)

        return pixels, words

    def attend(self, v: Tensor, l: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute V^ [B, P, C] and L^ [B, T, D] from normalized pixels and words.

        L^ is None if `update_words` is false.
        """
        if self.impl == "plain":
            return self._attend_plain(v, l, word_mask)
        return self._attend_absorbed(v, l, word_mask)

    def absorb(self, l: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the word-side operands of the kernel, in float32.

        Returns:
            keys and values [B, h*T, C], and the bias [B, h*T], -inf at padded words.
        """
        by_head = (self.heads, -1)

        # Project the words to keys, and scale them here: there are fewer words than pixels.
        key = F.linear(
            l, _at_least_float32(self.key_weight), _at_least_float32(self.key_bias)
        )  # [B, T, C]
        scale = (key.shape[2] // self.heads) ** -0.5
        key = key.unflatten(2, by_head) * scale  # [B, T, h, C/h]

        # Absorb the query projection of the pixels: its weight into the keys, its bias into a bias.
        query_weight = _at_least_float32(self.query_weight).unflatten(0, by_head)  # [h, C/h, C]
        query_bias = _at_least_float32(self.query_bias).unflatten(0, by_head)  # [h, C/h]
        keys = torch.einsum("bthe,hec->bhtc", key, query_weight).flatten(1, 2)  # [B, h*T, C]
        bias = torch.einsum("bthe,he->bht", key, query_bias)  # [B, h, T]
        bias = bias.masked_fill(~word_mask[:, None], float("-inf")).flatten(1)  # [B, h*T]

        # Project the words to values.
        value_weight, value_bias = self.word_value_weight, self.word_value_bias
        values = F.linear(
            l, _at_least_float32(value_weight), _at_least_float32(value_bias)
        )  # [B, T, C]
        if self.heads > 1:
            values = _spread_over_heads(values, self.heads)  # [B, h*T, C]

        return keys, values, bias

    def _attend_absorbed(
        self, v: Tensor, l: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with without_autocast(v.device):
            keys, values, bias = self.absorb(_at_least_float32(l), word_mask)

        # words_from_pixels holds averages of pixels: the value projection is still to be applied.
        pixels_from_words, words_from_pixels = bidirectional_attention(
            v, keys, values, bias=bias, impl=self.impl, heads=self.heads
        )  # [B, P, C], [B, h*T, C]
        if not self.update_words:
            return pixels_from_words, None

        by_head = (self.heads, -1)
        with without_autocast(v.device):
            words_from_pixels = words_from_pixels.unflatten(1, by_head)  # [B, h, T, C]
            weight = _at_least_float32(self.pixel_value_weight).unflatten(0, by_head)  # [h, D/h, C]
            bias = _at_least_float32(self.pixel_value_bias)  # [D]
            message = torch.einsum("bhtc,hdc->bthd", words_from_pixels, weight)  # [B, T, h, D/h]
            message = message.flatten(2) + bias  # [B, T, D]
            return pixels_from_words, message * word_mask[..., None]

    def _attend_plain(
        self, v: Tensor, l: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        # Project pixels to queries, and words to keys and values.
        by_head = (self.heads, -1)
        query = F.linear(v, self.query_weight, self.query_bias)
        query = query.unflatten(2, by_head)  # [B, P, h, C/h]
        key = F.linear(l, self.key_weight, self.key_bias)
        key = key.unflatten(2, by_head)  # [B, T, h, C/h]
        word_value = F.linear(l, self.word_value_weight, self.word_value_bias)
        word_value = word_value.unflatten(2, by_head)  # [B, T, h, C/h]

        with without_autocast(v.device):
            # Both softmaxes come from one score matrix.
            scale = query.shape[3] ** -0.5
            scores = (
                torch.einsum("bphe,bthe->bhpt", _at_least_float32(query), _at_least_float32(key))
                * scale
            )
            bias = torch.zeros_like(scores[:, 0, 0]).masked_fill(~word_mask, float("-inf"))
            bias, _ = finite_bias(bias)  # [B, T]
            over_words = (scores + bias[:, None, None]).softmax(3)  # [B, h, P, T]
            over_words = over_words * word_mask[:, None, None]
            over_pixels = scores.softmax(2)  # [B, h, P, T]

            # Pixels read words.
            message = torch.einsum("bhpt,bthe->bphe", over_words, _at_least_float32(word_value))
            pixels_from_words = message.flatten(2).to(v.dtype)  # [B, P, C]

        if not self.update_words:
            return pixels_from_words, None

        # Words read pixels.
        pixel_value = F.linear(v, self.pixel_value_weight, self.pixel_value_bias)
        pixel_value = pixel_value.unflatten(2, by_head)  # [B, P, h, D/h]
        with without_autocast(v.device):
            message = torch.einsum("bhpt,bphd->bthd", over_pixels, _at_least_float32(pixel_value))
            words_from_pixels = message.flatten(2)  # [B, T, D]
        return pixels_from_words, words_from_pixels * word_mask[..., None]


def _spread_over_heads(value: Tensor, heads: int) -> Tensor:
    """Repeat the values once per head, where head h keeps only its own slice of the channels.

    The sum over the heads then concatenates the slices. [B, T, C] -> [B, h*T, C].
    """
    ones = value.new_ones(1, value.shape[2] // heads)
    own_channels = torch.block_diag(*[ones] * heads)  # [h, C]
    return (value[:, None] * own_channels[:, None]).flatten(1, 2)


def _projection(inputs: int, outputs: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight = nn.Parameter(torch.empty(outputs, inputs))
    nn.init.xavier_uniform_(weight)
    return weight, nn.Parameter(torch.zeros(outputs))


def _gate(width: int) -> nn.Sequential:
    gate = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    nn.init.zeros_(gate[2].weight)
    nn.init.zeros_(gate[2].bias)
    return gate


def _gated(gate: nn.Module, message: Tensor) -> Tensor:
    return torch.tanh(gate(message)) * message


def _at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32. Leaves float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
