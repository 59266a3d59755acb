"""The git revision that runs and reports carry."""

from __future__ import annotations

import subprocess
from pathlib import Path

from coupalign.version import git_revision


def _git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_git_revision_tells_clean_dirty_and_untracked_folders(tmp_path: Path) -> None:
    # A repository with a committed folder and an untracked one.
    package, installed = tmp_path / "package", tmp_path / "installed"
    assert git_revision(tmp_path) == "unknown"
    _git(tmp_path, "init")
    package.mkdir()
    (package / "a.py").write_text("1\n")
    installed.mkdir()
    (installed / "b.py").write_text("1\n")
    _git(tmp_path, "add", "package")
    _git(tmp_path, "commit", "-m", "a")

    clean = git_revision(package)
    assert len(clean) >= 7
    assert set(clean) <= set("0123456789abcdef")
    assert git_revision(installed) == "unknown"

    (package / "a.py").write_text("2\n")
    assert git_revision(package) == f"{clean}+dirty"
    assert git_revision(tmp_path / "missing") == "unknown"
