"""CoupAlign: coupling word-pixel with sentence-mask alignments (NeurIPS 2022).

This is our reconstruction; docs/method.md says what is the paper's and what is ours.

Shape legend: B batch, S input side, T words, P pixels of a stage (H*W), C stage channels,
D text width, d mask width, N mask embeddings.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import CoupAlignConfig
from coupalign.errors import InputError
from coupalign.model.base import STAGES, ReferringModel
from coupalign.model.decoder import MaskHead, PixelDecoder
from coupalign.model.losses import coupalign_losses
from coupalign.model.proposals import MaskProposals
from coupalign.model.refine import PointRefinement, point_loss
from coupalign.model.sma import SentenceMaskAlignment
from coupalign.model.wpa import WordPixelAlignment


class CoupAlign(ReferringModel):
    """Word-pixel alignment inside the encoders, then sentence-mask alignment on mask proposals.

    Args:
        config: the model's part of the configuration.
        vocabulary: number of tokens of the tokenizer.
        image_size: S, pixels, a multiple of 32.

    Raises:
        InputError: two fields contradict each other; the message names both.
    """

    def __init__(self, config: CoupAlignConfig, vocabulary: int, image_size: int):
        word_stages = _count_word_stages(config)
        super().__init__(config, vocabulary, image_size, word_groups=word_stages)
        self.word_stages = word_stages
        channels, width = self.image.channels, config.decoder.width

        self.wpa = nn.ModuleDict()
        for stage in range(STAGES):
            if config.wpa.stages[stage]:
                # The last alignment updates the words only if the sentence is used after it.
                update_words = config.proposals.count > 0 or stage + 1 < word_stages
                self.wpa[str(stage)] = WordPixelAlignment(
                    channels[stage],
                    self.text.width,
                    heads=config.wpa.heads,
                    impl=config.wpa.impl,
                    update_words=update_words,
                )

        self.decoder = PixelDecoder(channels, width, config.decoder.depth)

        if config.proposals.count:
            proposal_channels = [channels[number - 1] for number in config.proposals.stages]
            self.proposals = MaskProposals(proposal_channels, width, config.proposals)
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
            words: token ids, int64 [B, T].
            word_mask: bool [B, T], true at real tokens.
            target: bool [B, S, S], or None.

        Returns:
            logits, float32 [B, S, S]; with a target the losses, see `coupalign_losses`.
        """
        # Align words and pixels at every stage, and merge the stages into one pixel embedding.
        stages, words = self.align(image, words, word_mask)  # 4 x [B, H, W, C], [B, T, D]
        embedding = self.decoder(stages)  # Y [B, d, S/4, S/4]

        # Let the sentence weight the mask proposals, and send their signals back to the pixels.
        pixels = embedding
        if self.config.proposals.count:
            proposal_stages = [stages[number - 1] for number in self.config.proposals.stages]
            masks = self.proposals(proposal_stages)  # Q_o [B, N, d]
            sentence = words[:, 0]  # L_g, the final [CLS] state [B, D]
            pixels = self.sma(masks, sentence, embedding)  # Y' [B, d, S/4, S/4]

        # Predict the mask at stride 4 and enlarge it.
        logits = self.head(pixels).float()  # [B, 1, S/4, S/4]
        logits = F.interpolate(logits, scale_factor=4.0, mode="bilinear", align_corners=False)
        logits = logits[:, 0]  # [B, S, S]

        # Decide the least certain pixels again.
        refined, points = logits, None
        if self.config.refine.points:
            refined, points = self.refine(logits, pixels, self.normalize(image))  # …, [B, K]

        if target is None:
            return refined

        losses = coupalign_losses(logits, embedding, target, config=self.config.losses)
        if points is not None:
            loss_of_points = point_loss(refined, points, target)
            losses["loss"] = losses["loss"] + loss_of_points
            losses["points"] = loss_of_points.detach()
        return losses

    def align(self, image: Tensor, words: Tensor, word_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the two encoders interleaved, with a word-pixel alignment after each stage.

        Args: see `forward`.

        Returns:
            aligned pixels of the four stages, [B, H, W, C] each, and the final words [B, T, D].
        """
        pixels = self.normalize(image)  # [B, S, S, 3]
        words = self.text.embed(words, word_mask)  # [B, T, D]

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


def _count_word_stages(config: CoupAlignConfig) -> int:
    """Count the stages that run a group of text layers.

    All of them do if the sentence weights the masks. Otherwise the words end at the last alignment:
    text layers after it would get no gradient, which data parallelism refuses.
    """
    proposals = config.proposals
    if proposals.count:
        if not proposals.stages:
            raise InputError(
                "model.proposals.stages is empty. "
                "Name the stages that the queries read, for instance [4]"
            )
        return STAGES

    aligned = [stage for stage in range(STAGES) if config.wpa.stages[stage]]
    if not aligned:
        raise InputError(
            "model.proposals.count is 0 and model.wpa.stages are all false, "
            "so nothing in the model would read the sentence. Set one of them"
        )
    return 1 + max(aligned)
