"""Which libraries are imported when, seen in fresh processes, and the workarounds themselves."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.compat import garbage_collection_paused, package_hidden
from tests.unit.bench.test_step import TINY

ROOT = Path(__file__).resolve().parents[2]

# Each costs half a second or more. torch._dynamo is the compiler, which torch's optimizers import
# when the first of them is made.
HEAVY = (
    "timm transformers torchvision scipy sympy triton mlflow deepspeed huggingface_hub "
    "torch._dynamo webdataset aiohttp pandas"
)

BUILD_SMALL_ENCODERS = """
import coupalign.cli.parser, coupalign.training.loop, coupalign.engine.ddp
import coupalign.tracking.forwarder
from coupalign.config.load import read_config
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_pretrained
config = read_config({file!r}, []).model
load_pretrained(build_model(config, 50, 64), config)
"""


def imported_by(code: str, libraries: str) -> set[str]:
    """Run the code in a fresh process and return which of the libraries it has then imported."""
    code = f"{code}\nimport sys; print(*({{*{libraries.split()!r}}} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_training_of_small_encoders_imports_no_library_it_does_not_need(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)

    assert imported_by(BUILD_SMALL_ENCODERS.format(file=str(file)), HEAVY) == set()


def test_scoring_and_predicting_import_no_library_they_do_not_need() -> None:
    code = "import coupalign.predict.predictor, coupalign.scoring.checkpoint"

    assert imported_by(code, HEAVY) == set()


@pytest.mark.parametrize(
    "module",
    [
        "coupalign.data.fork_server",
        "coupalign.distributed.stop",
        "coupalign.config.load",
        "coupalign.compat",
    ],
)
def test_modules_needed_first_import_no_torch(module: str) -> None:
    """The workers' server then imports torch while the rank does, and a signal is heard at once."""
    assert imported_by(f"import {module}", "torch numpy") == set()


def test_deepspeed_imports_no_mlflow() -> None:
    code = """
import torch
from coupalign.distributed.world import World
from coupalign.engine.zero import _import_deepspeed
_import_deepspeed(World(0, 1, 0, 1, torch.device("cpu")))
"""
    assert imported_by(code, "deepspeed mlflow pandas") == {"deepspeed"}


def test_prepare_torchvision_makes_it_importable() -> None:
    code = """
from coupalign.compat import prepare_torchvision
prepare_torchvision()
prepare_torchvision()
import torchvision
"""
    assert imported_by(code, "torchvision") == {"torchvision"}


def test_garbage_collection_resumes_after_an_error() -> None:
    with pytest.raises(KeyError), garbage_collection_paused():
        assert not gc.isenabled()
        raise KeyError

    assert gc.isenabled()


def test_garbage_collection_stays_off_if_it_was_off() -> None:
    gc.disable()
    try:
        with garbage_collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_hidden_package_cannot_be_imported() -> None:
    sys.modules.pop("this", None)

    with package_hidden("this"), pytest.raises(ModuleNotFoundError):
        __import__("this")

    assert "this" not in sys.modules


def test_imported_package_is_not_hidden() -> None:
    import colorsys

    with package_hidden("colorsys"):
        assert sys.modules["colorsys"] is colorsys
    assert sys.modules["colorsys"] is colorsys
