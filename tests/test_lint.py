"""Lint, format and types are part of the suite, so that what a person runs is what CI runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from beside import Script, outcome

ROOT = Path(__file__).resolve().parent.parent
BESIDE = (Script(Path(__file__).with_name("type_check.py")),)


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    run("ruff", "format", "--no-cache", "--check", ".")


def test_mypy_finds_nothing() -> None:
    found = outcome(BESIDE[0])
    assert found["status"] == 0, found["output"]
