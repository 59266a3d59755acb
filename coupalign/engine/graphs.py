"""CUDA graphs: the forward and the backward pass of a micro-batch, recorded once and then played back with one launch each.

Launching a step operator by operator keeps the host busy about as long as the GPU (docs/performance.md, "The host's share"). A graph
asks for what a step here has anyway: shapes that never change, no number read back, no tensor made on the host, weights that stay where
they are. What it changes for whoever calls it: every result lies where that of the last playback lay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coupalign.data.batch import Batch
from coupalign.engine.base import same_statistics


class RecordedStep(nn.Module):
    """A network that plays its training passes back. Scoring runs it as it is.

    Gradients must be there before the first backward pass of a step: `zero_gradients`.

    Args:
        net: image, words, word_mask, target -> scalar losses, of which "loss" alone has a gradient; on a CUDA device.
        batch: of the shapes and the memory layout of every batch to come, on that device.
    """

    def __init__(self, net: nn.Module, batch: Batch):
        super().__init__()
        self.net = net
        self.shapes = [
            part.shape for part in (batch.image, batch.words, batch.word_mask, batch.target)
        ]
        self.train()
        with same_statistics(net):
            torch.cuda.make_graphed_callables(
                net,
                (batch.image, batch.words, batch.word_mask, batch.target),
                allow_unused_input=True,
            )

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """As of the network."""
        if target is None:
            return self.net(image, words, word_mask)
        assert [part.shape for part in (image, words, word_mask, target)] == self.shapes, (
            "another shape than what was recorded"
        )
        return {
            name: loss.clone() for name, loss in self.net(image, words, word_mask, target).items()
        }


def zero_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter, float32 all of them, a new gradient of zeros, by one launch.

    Autograd adds to a gradient that is there. One that it first had to store would share memory with the graph's own, and the next
    micro-batch would write over the sum. New ones, since DDP rounds otherwise where it finds its own of the step before.
    """
    zeros = torch.zeros(
        sum(parameter.numel() for parameter in parameters), device=parameters[0].device
    )
    for parameter, part in zip(
        parameters, zeros.split([parameter.numel() for parameter in parameters])
    ):
        parameter.grad = part.view_as(parameter)
