"""Lint, format and types are part of the suite, so that what a person runs is what CI runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_every_file_is_formatted() -> None:
    run("ruff", "format", "--no-cache", "--check", ".")


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    # The folders lie at the top level, their import names under vllm_puzzle: links show mypy the import names.
    package = tmp_path / "links" / "vllm_puzzle"
    package.mkdir(parents=True)
    for folder in ("serving", "kernels", "model_configs", "bench"):
        (package / folder).symlink_to(ROOT / folder)
    cache = str(tmp_path / "cache")
    run("mypy", "--cache-dir", cache, "-p", "vllm_puzzle", MYPYPATH=str(tmp_path / "links"))
