"""CoupAlign: train and score models for referring image segmentation, on one machine or many.

Use a trained model with `coupalign.load(path).predict(image, sentence)`. Everything else is a verb
of the command line, see `coupalign --help`. Importing the package imports no heavy library, such as
torch, deepspeed, transformers, timm, webdataset or mlflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coupalign.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from coupalign.predict.predictor import Predictor

__all__ = ["__version__", "load"]


def load(path: str | Path, device: str | None = None) -> Predictor:
    """Load a trained model.

    Args:
        path: a run directory (its best checkpoint is taken, else its newest) or a checkpoint.
        device: "cpu", "cuda", "cuda:1" … Default: the GPU if there is one, else the CPU.
    """
    from coupalign.predict.predictor import Predictor

    return Predictor.from_checkpoint(path, device)
