"""The version of this package and of the checkout it runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def git_revision(folder: Path) -> str:
    """The commit that `folder` is checked out from: "1a2b3c4", "1a2b3c4+dirty" where files in it differ, else "unknown".

    An installed package inside somebody's checkout is "unknown": git must track the folder's own files.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return "unknown"
        return git("rev-parse", "--short=7", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
