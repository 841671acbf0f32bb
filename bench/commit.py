"""Which commit is measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

UNKNOWN, CHANGED = "unknown", "-dirty"


def found_commit() -> str:
    """The commit that this file's checkout is at, "-dirty" where tracked files differ; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    return done.stdout.strip() or UNKNOWN
