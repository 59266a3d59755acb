"""What is shown to a user is true: the README's commands parse and name files that exist, the flags are frozen, help is light."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.cli.parser import build_parser, parse_arguments

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not {".venv", "runs", "data"} & set(page.relative_to(ROOT).parts)
)
VERBS = {
    "synth": {"--images", "--seed", "--level", "--size", "--workers"},
    "pack": {"--out", "--workers", "--overwrite", "--dry-run"},
    "verify": {"--leaks"},
    "describe": set(),
    "config": {"--deepspeed", "--ranks"},
    "plan": {"--gpu", "--nodes", "--ranks-per-node", "--network"},
    "train": set(),
    "eval": {"--split", "--index", "--protocol", "--sentences", "--language-blind", "--pictures"},
    "compare": {"--split", "--protocol", "--tracking-uri"},
    "predict": {"--out", "--batch", "--device"},
    "reproduce": {
        "--data",
        "--scale",
        "--seeds",
        "--jobs",
        "--launcher",
        "--slurm",
        "--only-print",
    },
    "report": set(),
    "track": set(),
    "bench": {
        "--batch",
        "--steps",
        "--warmup",
        "--random-data",
        "--profile",
        "--beside",
        "--soak",
        "--out",
        "--against",
    },
    "doctor": {"--distributed"},
}


def verbs() -> dict[str, argparse.ArgumentParser]:
    actions = [
        action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(actions[0].choices)


def shown_commands() -> list[str]:
    """Lines of shell blocks in the pages that start coupalign, alone or through a launcher."""
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    ]
    lines = [
        line.split("  #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [
        line for line in lines if re.match(r"coupalign |launch/\w+\.sh ", line) and "…" not in line
    ]


def test_flags_are_frozen() -> None:
    """A new flag is a decision: most things belong into the configuration."""
    found = {
        name: {flag for action in parser._actions for flag in action.option_strings}
        for name, parser in verbs().items()
    }
    assert found == {
        name: flags | {"-h", "--help", "--json", "--local_rank"} for name, flags in VERBS.items()
    }


def test_overrides_may_stand_anywhere_and_nothing_else_may(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = parse_arguments(
        ["eval", "runs/x", "data.workers=0", "--split", "val", "evaluate.limit=3", "--json"]
    )
    assert (
        options.overrides == ["data.workers=0", "evaluate.limit=3"]
        and options.split == ["val"]
        and options.json
    )
    for wrong in (
        ["eval", "runs/x", "--splitt", "val"],
        ["eval", "runs/x", "--split", "val", "more"],
        ["track", "runs/x", "a=b"],
    ):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
        assert (
            f"unrecognized arguments: {' '.join(wrong[2:] if wrong[-1] != 'more' else ['more'])}"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("line", shown_commands())
def test_a_shown_command_is_accepted(line: str) -> None:
    words = shlex.split(line)
    if words[0].startswith("launch/"):
        assert (ROOT / words[0]).is_file()
        words = [word for word in words if word not in ("--dry-run",)]
        words = words[3:] if words[1] == "--hostfile" else words[1:]
    else:
        words = words[1:]
    words = words if words[0] in VERBS else ["train", *words]
    parse_arguments(words)
    for word in words:
        if word.startswith(("configs/", "shards/recipes/")):
            assert (ROOT / word).is_file(), f"{line}: no {word}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize(
    "code", ["import coupalign", "import coupalign.cli.parser as cli; cli.build_parser().format_help()"]
)
def test_the_package_and_its_help_import_nothing_heavy(code: str) -> None:
    heavy = "torch numpy pydantic deepspeed transformers timm webdataset mlflow"
    check = f"{code}; import sys; found = set('{heavy}'.split()) & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([verb, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out
