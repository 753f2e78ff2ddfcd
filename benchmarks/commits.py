"""The commit that a measurement belongs to."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def current_commit() -> str:
    """To be read before a measurement: commits may be made while it runs. Records and their report do not count as changes."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/*.jsonl", ":!BENCHMARKS.md"], cwd=ROOT)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return commit.stdout.decode().strip() + ("-dirty" if changed.returncode else "")
