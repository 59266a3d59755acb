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

    The pixel-side projections Wq and Wv are absorbed into the word side, which is exact because softmax rows sum to 1:
    S = V [(L Wk) Wq^T]^T and A (V Wv + b) = (A V) Wv + b. `impl="plain"` keeps them where they are written: the oracle.
    The last layer of each gate starts at zero, so that step 0 leaves the encoders as they were loaded.

    The projections are parameters of this module rather than Linear layers, because the absorbed form uses the weights
    themselves: ZeRO stage 3 has them whole only while the module that owns them runs.

    Raises:
        InputError: the heads do not divide both widths, or `impl` is not in this build.
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
            choose(impl)
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
            pixels [B, P, C] and words [B, T, D]; the words are unchanged where `update_words` is false.
        """
        pixels_from_words, words_from_pixels = self.attend(
            self.norm_pixels(pixels), self.norm_words(words), word_mask
        )
        pixels = pixels + _gated(self.gate_pixels, pixels_from_words).to(pixels.dtype)
        if self.update_words:
            message = _gated(self.gate_words, words_from_pixels) * word_mask[..., None]
            words = words + message.to(words.dtype)
        return pixels, words

    def attend(self, v: Tensor, l: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: E741
        """Both messages, V^ [B, P, C] and L^ [B, T, D] (none without `update_words`), of normalized pixels and words."""
        return (self._attend_plain if self.impl == "plain" else self._attend_absorbed)(
            v, l, word_mask
        )

    def _attend_absorbed(
        self, v: Tensor, l: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:  # noqa: E741
        with without_autocast(v.device):
            keys, values, bias = self.absorb(_exact(l), word_mask)
        pixels_from_words, read = bidirectional_attention(
            v, keys, values, bias, self.impl, self.heads
        )
        if not self.update_words:
            return pixels_from_words, None
        with without_autocast(v.device):
            read = read.unflatten(1, (self.heads, -1))  # [B, h, T, C]
            weight = _exact(self.pixel_value_weight).unflatten(0, (self.heads, -1))  # [h, D/h, C]
            message = torch.einsum("bhtc,hdc->bthd", read, weight).flatten(2) + _exact(
                self.pixel_value_bias
            )
            return pixels_from_words, message * word_mask[..., None]

    def absorb(self, l: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
        """Word-side operands of the kernel, computed in float32: keys and values [B, h*T, C], bias [B, h*T]."""
        key = F.linear(l, _exact(self.key_weight), _exact(self.key_bias))  # [B, T, C]
        key = (
            key.unflatten(2, (self.heads, -1)) * (key.shape[2] // self.heads) ** -0.5
        )  # [B, T, h, C/h]
        query_weight = _exact(self.query_weight).unflatten(0, (self.heads, -1))  # [h, C/h, C]
        query_bias = _exact(self.query_bias).unflatten(0, (self.heads, -1))  # [h, C/h]
        keys = torch.einsum("bthe,hec->bhtc", key, query_weight).flatten(1, 2)  # [B, h*T, C]
        bias = torch.einsum("bthe,he->bht", key, query_bias)  # [B, h, T]
        bias = bias.masked_fill(~word_mask[:, None], float("-inf")).flatten(1)  # [B, h*T]
        value = F.linear(
            l, _exact(self.word_value_weight), _exact(self.word_value_bias)
        )  # [B, T, C]
        if self.heads > 1:
            value = _own_channels(value, self.heads)  # [B, h*T, C]
        return keys, value, bias

    def _attend_plain(
        self, v: Tensor, l: Tensor, word_mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:  # noqa: E741
        split = (self.heads, -1)
        query = F.linear(v, self.query_weight, self.query_bias).unflatten(
            2, split
        )  # [B, P, h, C/h]
        key = F.linear(l, self.key_weight, self.key_bias).unflatten(2, split)  # [B, T, h, C/h]
        word_value = F.linear(l, self.word_value_weight, self.word_value_bias).unflatten(
            2, split
        )  # [B, T, h, C/h]
        with without_autocast(v.device):
            scores = (
                torch.einsum("bphe,bthe->bhpt", _exact(query), _exact(key)) * query.shape[3] ** -0.5
            )
            bias, _ = finite_bias(
                torch.zeros_like(scores[:, 0, 0]).masked_fill(~word_mask, float("-inf"))
            )
            over_words = (scores + bias[:, None, None]).softmax(3) * word_mask[
                :, None, None
            ]  # [B, h, P, T]
            over_pixels = scores.softmax(2)
            pixels_from_words = (
                torch.einsum("bhpt,bthe->bphe", over_words, _exact(word_value))
                .flatten(2)
                .to(v.dtype)
            )
        if not self.update_words:
            return pixels_from_words, None
        pixel_value = F.linear(v, self.pixel_value_weight, self.pixel_value_bias).unflatten(
            2, split
        )  # [B, P, h, D/h]
        with without_autocast(v.device):
            message = torch.einsum("bhpt,bphd->bthd", over_pixels, _exact(pixel_value)).flatten(2)
        return pixels_from_words, message * word_mask[..., None]


def _own_channels(value: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [B, h*T, C]: head h keeps its own slice of the channels, so that the sum over heads concatenates."""
    own = torch.block_diag(*[value.new_ones(1, value.shape[2] // heads)] * heads)  # [h, C]
    return (value[:, None] * own[:, None]).flatten(1, 2)


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


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
