"""What all tests share: a tiny packed RefShapes, and the folder of real photographs, where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from coupalign.cli.parser import main
from coupalign.compat import prepare_torchvision
from coupalign.data import fork_server

# Without a GPU the kernels run in Triton's interpreter. It must be asked for before anything imports Triton, which
# DeepSpeed does; `impl: auto` does not care.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

prepare_torchvision()  # tests import timm and transformers themselves

# The one server of worker processes and of ranks (distributed/ranks.py) has imported what either needs.
fork_server.PRELOADED[:] = ["tests.distributed.preload"]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real COCO photographs and records; it is never copied into the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real photographs here ({folder.name}/ is not beside the checkout)")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 scenes, packed."""
    folder = tmp_path_factory.mktemp("refshapes")
    assert (
        main(["synth", str(folder / "refer"), "--images", "64", "--size", "64", "--workers", "0"])
        == 0
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nroot: {folder / 'refer'}\nshard_mb: 0.1\nvocabulary_size: 300\n"
        "sets: [{dataset: refshapes, split_by: unc, folder: refcoco}]\n"
    )
    assert main(["pack", str(recipe), "--out", str(folder / "shards"), "--workers", "1"]) == 0
    return folder / "shards"
