"""`make check` finds the tests of a changed file (tests/changed.py)."""

from __future__ import annotations

import pytest

from tests import changed
from tests.changed import ROOT

MODULES = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("coupalign/**/*.py"))


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("coupalign/data/order.py", ["tests/unit/data/test_order.py"]),
        ("coupalign/version.py", ["tests/unit/test_version.py"]),
        ("coupalign/kernels/fused.py", ["tests/kernels"]),
        ("configs/demo.yaml", ["tests/unit/config"]),
        ("slurm/env.sh", ["tests/docs/test_scripts.py"]),
        ("README.md", ["tests/docs"]),
        ("tests/unit/test_files.py", ["tests/unit/test_files.py"]),
        ("tests/conftest.py", []),
        ("constraints.txt", []),
    ],
)
def test_changed_file_leads_to_its_tests(file, tests):
    assert (ROOT / file).is_file()

    assert changed.tests_of(file) == tests


def test_tests_of_every_module_exist():
    found = [test for module in MODULES for test in changed.tests_of(module)]

    assert len(found) > len(MODULES) / 2
    assert [test for test in found if not (ROOT / test).exists()] == []
