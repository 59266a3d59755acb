"""CoupAlign: coupling word-pixel with sentence-mask alignments (NeurIPS 2022), as reconstructed in docs/method.md.

Shape legend: B batch, S input side, T words, P pixels of a stage (H*W), C stage channels, D text width,
d mask width, N mask embeddings.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import CoupAlignConfig
from coupalign.errors import InputError
from coupalign.model.base import STAGES, ReferringModel
from coupalign.model.decoder import MaskHead, PixelDecoder
from coupalign.model.losses import referring_losses
from coupalign.model.proposals import MaskProposals
from coupalign.model.refine import PointRefinement, point_loss
from coupalign.model.sma import SentenceMaskAlignment, sentence_state
from coupalign.model.wpa import WordPixelAlignment


class CoupAlign(ReferringModel):
    """Image and text encoders that exchange words and pixels at every stage, a mask generator, a sentence that weights its masks.

    Args:
        config: the model's part of the configuration.
        vocabulary: number of tokens of the tokenizer.
        image_size: S, pixels, a multiple of 32.

    Raises:
        InputError: a field does not fit another; the message names both.
    """

    def __init__(self, config: CoupAlignConfig, vocabulary: int, image_size: int):
        word_stages = _word_stages(config)
        super().__init__(config, vocabulary, image_size, word_groups=word_stages)
        self.word_stages = word_stages
        channels, width = self.image.channels, config.decoder.width
        self.wpa = nn.ModuleDict(
            {
                str(stage): WordPixelAlignment(
                    channels[stage],
                    self.text.width,
                    config.wpa.heads,
                    config.wpa.impl,
                    update_words=config.proposals.count > 0 or stage + 1 < self.word_stages,
                )
                for stage in range(STAGES)
                if config.wpa.stages[stage]
            }
        )
        self.decoder = PixelDecoder(channels, width, config.decoder.depth)
        if config.proposals.count:
            self.proposals = MaskProposals(
                [channels[s - 1] for s in config.proposals.stages], width, config.proposals
            )
            self.sma = SentenceMaskAlignment(width, self.text.width, config.sma.scaled)
        self.head = MaskHead(width)
        if config.refine.points:
            self.refine = PointRefinement(width, config.refine)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Segment what each sentence refers to.

        Args:
            image: uint8 [B, 3, S, S], RGB.
            words: token numbers, int64 [B, T].
            word_mask: bool [B, T], true at real tokens.
            target: bool [B, S, S], or none.

        Returns:
            logits, float32 [B, S, S]; with a target the losses, see `referring_losses`.
        """
        stages, words = self.align(image, words, word_mask)  # 4 x [B, H, W, C], [B, T, D]
        embedding = pixels = self.decoder(stages)  # Y [B, d, S/4, S/4]
        if self.config.proposals.count:
            masks = self.proposals(
                [stages[s - 1] for s in self.config.proposals.stages]
            )  # Q_o [B, N, d]
            sentence = sentence_state(words, word_mask, self.config.sma.sentence)  # L_g [B, D]
            pixels = self.sma(masks, sentence, embedding)  # Y' [B, d, S/4, S/4]
        logits = F.interpolate(
            self.head(pixels).float(), scale_factor=4.0, mode="bilinear", align_corners=False
        )[:, 0]
        refined, points = (
            self.refine(logits, pixels, self.normalized(image))
            if self.config.refine.points
            else (logits, None)
        )
        if target is None:
            return refined
        losses = referring_losses(logits, embedding, target, self.config.losses)
        if points is not None:
            again = point_loss(refined, points, target)
            losses |= {"loss": losses["loss"] + again, "points": again.detach()}
        return losses

    def align(self, image: Tensor, words: Tensor, word_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """The two encoders, interleaved: aligned pixels of the four stages [B, H, W, C] and the final words [B, T, D]."""
        pixels = self.normalized(image)  # [B, S, S, 3]
        words = self.text.embed(words, word_mask) if self.word_stages else words
        stages = []
        for stage in range(STAGES):
            pixels = self.image(stage, pixels)  # [B, H, W, C]
            if stage < self.word_stages:
                words = self.text(stage, words, word_mask)  # [B, T, D]
            if str(stage) in self.wpa:
                aligned, words = self.wpa[str(stage)](pixels.flatten(1, 2), words, word_mask)
                pixels = aligned.view_as(pixels)
            stages.append(pixels)
        return stages, words


def _word_stages(config: CoupAlignConfig) -> int:
    """How many stages the words take part in: all where the sentence weights the masks, else up to the last alignment.

    Text layers behind that would be trained by nothing, which data parallelism refuses.
    """
    proposals = config.proposals
    if wrong := [s for s in proposals.stages if not 1 <= s <= STAGES]:
        raise InputError(
            f"model.proposals.stages names stage {wrong[0]}; the image encoder has stages 1 to {STAGES}"
        )
    if proposals.count and not proposals.stages:
        raise InputError(
            "model.proposals.stages is empty; name the stages that the queries read, (4,) for instance"
        )
    if proposals.count:
        return STAGES
    if not any(config.wpa.stages):
        raise InputError(
            "model.proposals.count = 0 and model.wpa.stages all false: nothing in the model would read the sentence"
        )
    return 1 + max(stage for stage in range(STAGES) if config.wpa.stages[stage])
