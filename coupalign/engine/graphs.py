"""CUDA graphs: record the passes of a micro-batch once, then replay each by one launch.

Launching a step operator by operator keeps the host busy about as long as the GPU
(docs/performance.md, "The host's share"). A graph needs shapes that never change, no number read
back from the device, no tensor made on the host, and weights that stay in place. A step has all
of that anyway.

Caution: each replay overwrites the previous outputs, so copy them if you need them later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coupalign.data.batch import Batch
from coupalign.engine.base import preserved_buffers


class RecordedStep(nn.Module):
    """A network that replays its training passes. Inference runs it eagerly.

    Call `zero_gradients` before the first backward pass of each step: gradients must exist.

    Args:
        net: maps image, words, word_mask, target to scalar losses, of which only "loss" has a
            gradient; on a CUDA device.
        batch: an example with the shapes and the memory layout of every batch to come, on that
            device.
    """

    def __init__(self, net: nn.Module, batch: Batch):
        super().__init__()
        self.net = net
        inputs = (batch.image, batch.words, batch.word_mask, batch.target)
        self.shapes = [tensor.shape for tensor in inputs]

        self.train()
        with preserved_buffers(net):
            torch.cuda.make_graphed_callables(net, inputs, allow_unused_input=True)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Run the network, or replay its recording if a target is given; returns the same."""
        if target is None:
            return self.net(image, words, word_mask)

        shapes = [tensor.shape for tensor in (image, words, word_mask, target)]
        assert shapes == self.shapes, f"recorded for shapes {self.shapes}, called with {shapes}"
        losses = self.net(image, words, word_mask, target)
        return {name: loss.clone() for name, loss in losses.items()}


def zero_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter (float32) a new gradient of zeros, all in one allocation.

    Gradients must exist before the first replay: autograd then accumulates into them. Otherwise
    they would alias the graph's buffers, and the next micro-batch would overwrite the sum. They
    must be new in each step, because reusing the last step's changes DDP's rounding.
    """
    sizes = [parameter.numel() for parameter in parameters]
    zeros = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, gradient in zip(parameters, zeros.split(sizes)):
        parameter.grad = gradient.view_as(parameter)
