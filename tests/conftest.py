"""What all tests share: a packed RefShapes, real photographs, notes, and the order of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from coupalign.cli.parser import main
from coupalign.compat import prepare_torchvision
from coupalign.data import fork_server

# Without a GPU the kernels run in Triton's interpreter. It must be asked for before anything
# imports Triton, which DeepSpeed does; `impl: auto` does not care.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests import timm and transformers themselves.
prepare_torchvision()

# The one server of worker processes and of ranks (distributed/ranks.py) has imported what either
# needs.
fork_server.PRELOADED[:] = ["tests.distributed.preload"]

ROOT = Path(__file__).resolve().parents[1]

# Each file runs whole in one of several processes (--dist loadfile), and the last one decides when
# a run ends. So those with the most processor time start first. These are the ones over 15 s.
LONG_FILES = [
    "tests/e2e/test_main_job.py",
    "tests/distributed/test_engine.py",
    "tests/distributed/test_worlds.py",
    "tests/unit/model/test_compile.py",
    "tests/kernels/test_fused.py",
    "tests/unit/tracking/test_mlflow.py",
    "tests/kernels/test_resources.py",
    "tests/e2e/test_reproduce.py",
    "tests/unit/costs/test_footprint.py",
    "tests/docs/test_scripts.py",
    "tests/unit/bench/test_step.py",
    "tests/distributed/test_kernels.py",
    "tests/kernels/test_operation.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first. The tests of a file keep their order."""
    ranks = {ROOT / file: rank for rank, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(LONG_FILES)))


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with a line that a reader of the test report should see, though the test passed."""
    return partial(record_property, "note")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the notes."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, text in report.user_properties:
            if name == "note":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real COCO photographs and records; it is never copied into the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real photographs here ({folder.name}/ is not next to the checkout)")
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 scenes, packed."""
    folder = tmp_path_factory.mktemp("refshapes")
    refer, recipe, packed = folder / "refer", folder / "recipe.yaml", folder / "shards"

    synth = ["synth", str(refer), "--images", "64", "--size", "64", "--workers", "0"]
    assert main(synth) == 0

    recipe.write_text(
        f"name: tiny\nroot: {refer}\nshard_mb: 0.1\nvocabulary_size: 300\n"
        "sets: [{dataset: refshapes, split_by: unc, folder: refcoco}]\n"
    )
    assert main(["pack", str(recipe), "--out", str(packed), "--workers", "1"]) == 0
    return packed
