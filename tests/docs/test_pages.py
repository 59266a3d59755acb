"""The pages are true: their commands parse, files they name exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from coupalign.cli.parser import parse_arguments
from tests.unit.cli.test_parser import FLAGS

ROOT = Path(__file__).parents[2]
NOT_OURS = {".venv", "runs", "data"}
MAX_LINE = 120
PAGES = sorted(
    page for page in ROOT.rglob("*.md") if not NOT_OURS & set(page.relative_to(ROOT).parts)
)


def shown_commands() -> Iterator[str]:
    """Yield the lines of shell blocks that start coupalign, alone or through a launcher."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("  #")[0].strip()
                if re.match(r"coupalign |launch/\w+\.sh ", command) and "…" not in command:
                    yield command


@pytest.mark.parametrize("command", shown_commands())
def test_shown_command_is_accepted(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program.startswith("launch/"):
        assert (ROOT / program).is_file()
        arguments = [argument for argument in arguments if argument != "--dry-run"]
        if arguments[0] == "--hostfile":
            arguments = arguments[2:]
    if arguments[0] not in FLAGS:
        # A launcher trains by default.
        arguments = ["train", *arguments]

    parse_arguments(arguments)

    for argument in arguments:
        if argument.startswith(("configs/", "shards/recipes/")):
            assert (ROOT / argument).is_file(), f"{command}: no {argument}"


def test_markdown_lines_have_at_most_120_characters() -> None:
    # Dated benchmark results are a record, which nobody rewraps.
    pages = [page for page in PAGES if not page.match("benchmarks/[0-9]*.md")]

    long_lines = []
    for page in pages:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > MAX_LINE:
                long_lines.append(f"{page.relative_to(ROOT)}:{number}: {len(line)} characters")

    assert not long_lines


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
