"""Print the test files that belong to what has changed, for `make check`.

Changed means: not committed, or different from the last commit that this branch shares with main.
`coupalign/ROOM/x.py` belongs to `tests/unit/ROOM/test_x.py` and the `test_x_*.py` next to it. Tests
that start several processes (e2e, distributed, cluster, browser) are only named, on stderr.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("tests/unit/", "tests/docs/", "tests/kernels/")
# Files that no test file is named after, by the beginning of their path.
OTHERS = {
    "launch/": "tests/docs/test_scripts.py",
    "slurm/": "tests/docs/test_scripts.py",
    "benchmarks/": "tests/docs/test_scripts.py",
    "configs/": "tests/unit/config",
    "docs/": "tests/docs",
    "README.md": "tests/docs",
    "coupalign/kernels/": "tests/kernels",
}


def changed_files() -> list[str]:
    """List the changed files that still exist, relative to the root."""
    base = _git("merge-base", "main", "HEAD") or ["HEAD"]
    changed = _git("diff", "--name-only", *base)
    untracked = _git("ls-files", "--others", "--exclude-standard")
    return sorted(file for file in {*changed, *untracked} if (ROOT / file).is_file())


def tests_of(file: str) -> list[str]:
    """List the test files and folders for one changed file."""
    path = PurePosixPath(file)
    for beginning, tests in OTHERS.items():
        if file.startswith(beginning):
            return [tests]
    if path.parts[0] == "tests":
        return [file] if path.name.startswith("test_") else []
    if path.parts[0] != "coupalign" or path.suffix != ".py":
        return []

    folder = ROOT / "tests" / "unit" / PurePosixPath(*path.parts[1:-1])
    name = f"test_{path.stem.strip('_')}"
    found = sorted([*folder.glob(f"{name}.py"), *folder.glob(f"{name}_*.py")])
    return [str(test.relative_to(ROOT)) for test in found]


def _git(*words: str) -> list[str]:
    """Return the lines that git prints; none if it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def main() -> None:
    """Print the quick ones, one per line, and name the others on stderr."""
    tests = sorted({test for file in changed_files() for test in tests_of(file)})
    for test in tests:
        if test.startswith(QUICK) or f"{test}/" in QUICK:
            print(test)
        else:
            print(f"not run by `make check`: {test}", file=sys.stderr)


if __name__ == "__main__":
    main()
