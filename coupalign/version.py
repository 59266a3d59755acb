"""The version of this package and of the checkout it runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__version__ = "0.1.0"


def git_revision(folder: Path) -> str:
    """Return the git commit of a folder, for example "1a2b3c4".

    "1a2b3c4+dirty" means that files in the folder differ from the commit. "unknown" means that git
    does not track the folder's files, as with a package installed into another project's checkout.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return "unknown"
        commit = git("rev-parse", "--short=7", "HEAD")
        is_dirty = bool(git("status", "--porcelain", "--", "."))
        return f"{commit}+dirty" if is_dirty else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"
