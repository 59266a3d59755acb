"""What a start imports, asked of processes of their own: a library that nothing needs must not come back unseen."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.compat import garbage_collection_paused, package_hidden
from tests.unit.bench.test_step import TINY

ROOT = Path(__file__).resolve().parents[2]
TRAINING = "import coupalign.cli.parser, coupalign.training.loop, coupalign.engine.ddp, coupalign.tracking.forwarder"
BUILT = f"""
{TRAINING}
from coupalign.config.load import read_config
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_pretrained
config = read_config({{config!r}}, []).model
load_pretrained(build_model(config, 50, 64), config)
"""
# Half a second and more each; `torch._dynamo` is the compiler, which torch's optimizers import when the first is made.
LIBRARIES = "timm transformers torchvision scipy sympy triton mlflow deepspeed huggingface_hub torch._dynamo webdataset aiohttp pandas"


def imported(code: str, libraries: str) -> set[str]:
    """Which of the libraries are imported once `code` has run."""
    code = f"{code}\nimport sys; print(*({{*{libraries.split()!r}}} & {{*sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_a_training_of_small_encoders_imports_none_of_the_libraries_that_others_need(
    tmp_path: Path,
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    assert imported(BUILT.format(config=str(file)), LIBRARIES) == set()


def test_scoring_and_predicting_import_none_of_them_either() -> None:
    assert (
        imported("import coupalign.predict.predictor, coupalign.scoring.checkpoint", LIBRARIES)
        == set()
    )


@pytest.mark.parametrize(
    "module",
    [
        "coupalign.data.fork_server",
        "coupalign.distributed.stop",
        "coupalign.config.load",
        "coupalign.compat",
    ],
)
def test_what_comes_before_the_imports_of_a_training_needs_no_torch(module: str) -> None:
    """So that the server of the worker processes begins to import beside the rank, and a signal is heard from the first moment on."""
    assert imported(f"import {module}", "torch numpy") == set()


def test_the_collector_is_as_it_was_also_after_an_error() -> None:
    with pytest.raises(KeyError), garbage_collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    with garbage_collection_paused():
        pass
    try:
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_package_is_absent_for_a_while_unless_it_is_imported_already() -> None:
    sys.modules.pop("this", None)
    with package_hidden("this"), pytest.raises(ModuleNotFoundError):
        __import__("this")
    import colorsys

    with package_hidden("colorsys"):
        assert sys.modules["colorsys"] is colorsys
    assert sys.modules["colorsys"] is colorsys and "this" not in sys.modules


def test_deepspeed_does_not_bring_mlflow() -> None:
    code = """
import torch
from coupalign.distributed.world import World
from coupalign.engine.zero import _import_deepspeed
_import_deepspeed(World(0, 1, 0, 1, torch.device("cpu")))
"""
    assert imported(code, "deepspeed mlflow pandas") == {"deepspeed"}
