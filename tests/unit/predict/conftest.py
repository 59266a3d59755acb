"""A checkpoint of a random tiny model, a predictor that opened it, and three photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.load import dump
from coupalign.config.schema import Config
from coupalign.data.packing.vocabulary import train_vocabulary
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.engine.manifest import write_manifest
from coupalign.model.build import build_model
from coupalign.model.weights.load import write_weights
from coupalign.predict.predictor import Predictor

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SENTENCES = ["small red star", "the blue square on the left", "second circle from the right"]

# Name, shape and mode.
PHOTOS = [
    ("wide.jpg", (40, 90, 3), "RGB"),
    ("tall.png", (70, 30, 3), "RGB"),
    ("gray.png", (33, 44), "L"),
]


def tiny_config(width: int = 32, resize: str = "squash") -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "precision": "fp32",
            "data": {"image_size": 64, "max_tokens": 20, "resize": resize},
            "model": {
                "image": {"kind": "small", "widths": [8, 8, 8, 8]},
                "text": {"kind": "small", "width": 16, "layers": 4, "heads": 2},
                "decoder": {"width": width},
                "proposals": {"count": 4, "layers": 1, "heads": 2, "ffn": 16},
            },
        }
    )


def write_checkpoint(
    folder: Path, config: Config, seed: int = 0, average: float | None = None
) -> Path:
    """Write a checkpoint directory of a random model.

    Args:
        average: if given, ema.safetensors holds the weights times this.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    train_vocabulary(SENTENCES, folder / "vocabulary.txt", 100)
    tokenizer = Tokenizer.open(str(folder / "vocabulary.txt"))
    tokenizer.save(folder / "tokenizer")

    torch.manual_seed(seed)
    model = build_model(config.model, len(tokenizer), config.data.image_size)
    # Some pixels become foreground and some do not.
    torch.nn.init.normal_(model.head.classify.weight, std=2.0)
    torch.nn.init.zeros_(model.head.classify.bias)

    state = model.state_dict()
    write_weights(folder / "weights.safetensors", state)
    if average is not None:
        averaged = {
            name: value * average for name, value in state.items() if value.is_floating_point()
        }
        write_weights(folder / "ema.safetensors", averaged)
    write_manifest(folder, ALONE)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(folder / "checkpoints" / "step-00000010", tiny_config())
    (folder / "checkpoints" / "best").symlink_to("step-00000010")
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor.from_checkpoint(run, "cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photographs of `PHOTOS`."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, shape, mode in PHOTOS:
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / name)
    return folder
