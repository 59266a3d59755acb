"""PixelDecoder and MaskHead: shapes, independence of the batch."""

from __future__ import annotations

import torch

from coupalign.model.decoder import MaskHead, PixelDecoder


def test_decoder_and_head_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    channels = (8, 12, 16, 20)
    decoder, head = PixelDecoder(channels, 16), MaskHead(16)
    maps = [torch.randn(3, 16 >> i, 16 >> i, c) for i, c in enumerate(channels)]

    y = decoder(maps)
    logits = head(y)
    alone = head(decoder([m[1:2] for m in maps]))

    assert y.shape == (3, 16, 16, 16) and logits.shape == (3, 1, 16, 16)
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-4, atol=1e-5)
    assert (y < 0).any(), "the mask signals need both signs"


def test_decoder_depth_is_the_number_of_convolutions_per_level():
    decoder = PixelDecoder((8, 12), 16, depth=3)

    for level in decoder.smooth:
        convolutions = [m for m in level.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(convolutions) == 3
