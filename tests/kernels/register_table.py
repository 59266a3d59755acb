"""The committed table of what each kernel needs of a GPU: registers, spills and shared memory.

    python -m tests.kernels.register_table --write      # compile all kernels, write the table
    python -m tests.kernels.register_table --part 3     # compile one sixth, print it as JSON

Compiling all kernels takes minutes. While the kernels and Triton are those of the table, a test run
compiles only a sixth of them and compares (test_resources.py).
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from coupalign.cli.parser import main as coupalign
from coupalign.files import whole_file
from coupalign.kernels import fused, plan, resources

TABLE = Path(__file__).with_name("registers.tsv")
PARTS = 6
WRITE = "python -m tests.kernels.register_table --write"

Row = dict[str, Any]
# The columns that name a kernel; the others are what the compiler made of it.
NAMES = ("arch", "kernel", "dtype", "channels", "words")


@dataclass(frozen=True)
class Table:
    """Rows by name, and what they were compiled from and with."""

    source: str
    triton_version: str
    rows: dict[tuple[str, ...], Row]


def name_of(row: Row) -> tuple[str, ...]:
    """Return what identifies a row: architecture, kernel, type, channels, words."""
    return tuple(str(row[column]) for column in NAMES)


def by_name(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    """Index the rows by their names. All values become strings, as they are in the file."""
    texts = [{column: str(value) for column, value in row.items()} for row in rows]
    indexed = {name_of(row): row for row in texts}
    assert len(indexed) == len(rows), "two kernels have one name"
    return indexed


def source_hash() -> str:
    """Hash the code that decides what is compiled. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for module in (fused, plan, resources):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node, clean=False) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


def part_of_cases(part: int) -> list[resources.Case]:
    """Return every sixth kernel, in an order that mixes architectures, kernels and types."""

    def shuffled(case: resources.Case) -> str:
        return hashlib.sha256(repr(case).encode()).hexdigest()

    return sorted(resources.all_cases(), key=shuffled)[part % PARTS :: PARTS]


def read_table() -> Table:
    """Read the committed table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        source = next(file).split()[-1]
        version = next(file).split()[-1]
        rows = list(csv.DictReader(file, delimiter="\t"))
    return Table(source, version, by_name(rows))


def write_table(rows: Sequence[Row]) -> None:
    """Replace the committed table."""
    with whole_file(TABLE, "w") as file:
        file.write(f"# source: {source_hash()}\n# triton: {triton.__version__}\n")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def compile_in_new_process(part: int | None) -> subprocess.CompletedProcess[str]:
    """Compile a sixth of the kernels (None: all) with Triton's compiler and an empty cache.

    This process may have been told to interpret the kernels, which cannot be undone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = [] if part is None else ["--part", str(part)]
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.run(
            [sys.executable, "-m", "tests.kernels.register_table", *chosen],
            env=environment | {"TRITON_CACHE_DIR": cache},
            cwd=Path(__file__).parents[2],
            text=True,
            capture_output=True,
        )


def main() -> int:
    """Run `coupalign bench registers` on all kernels or on a part of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, help="compile only this sixth of the kernels")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    if options.write and options.part is not None:
        parser.error("--write needs all kernels")

    if options.part is not None:
        chosen = part_of_cases(options.part)
        resources.all_cases = lambda: chosen

    shown = io.StringIO()
    with redirect_stdout(shown):
        status = coupalign(["bench", "registers", "--json"])
    print(shown.getvalue(), end="")

    if options.write:
        write_table(json.loads(shown.getvalue().splitlines()[-1]))
    return status


if __name__ == "__main__":
    sys.exit(main())
