"""CoupAlign: distributed training of referring image segmentation, from annotation files to tracked scores.

`coupalign.load(path).predict(image, sentence)` uses a trained model; everything else is a verb of the command line
(`coupalign --help`). Importing the package imports none of torch, deepspeed, transformers, timm, webdataset or mlflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coupalign.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from coupalign.predict.predictor import Predictor
__all__ = ["__version__", "load"]


def load(path: str | Path, device: str | None = None) -> Predictor:
    """Read a trained model.

    Args:
        path: a run directory (its best checkpoint, else its newest) or one checkpoint directory.
        device: "cpu", "cuda", "cuda:1" …; none: the GPU where there is one.
    """
    from coupalign.predict.predictor import Predictor

    return Predictor.from_checkpoint(path, device)
