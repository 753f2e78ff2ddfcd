"""Which commit a measurement is of."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def current_commit() -> str:
    """Asked before a measurement: later ones may be made while it runs. The records and their report do not count as a change."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/*.jsonl", ":!BENCHMARKS.md"], cwd=ROOT)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return commit.stdout.decode().strip() + ("-dirty" if changed.returncode else "")
