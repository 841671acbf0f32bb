"""README statements that a machine can check: the two commands, the file tree, the flags and files it names."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def tracked_files() -> set[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listing.splitlines())


def test_the_tree_names_every_module_test_and_model_and_nothing_else() -> None:
    (block,) = re.findall(r"```tree\n(.*?)```", README, re.DOTALL)
    named, folders = set(), [""]
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[: depth + 1]
        path = "".join(folders) + name
        if name.endswith("/"):
            folders.append(name)
        named.add(path)
        assert len(line.split()) > 1, f"{path}: a purpose is missing"
    files = {name for name in named if not name.endswith("/")}
    assert {name for name in files if not (ROOT / name).is_file()} == set()
    wanted = {name for name in tracked_files() if name.endswith(".py")}
    assert wanted - files == set()
    for folder in named - files:
        assert (ROOT / folder).is_dir(), folder


def test_the_test_command_is_what_ci_calls() -> None:
    assert "uv run vllm-puzzle serve\n" in README
    assert "uv run pytest\n" in README
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "uv run pytest"


def test_the_supported_vllm_range_is_the_one_the_code_checks() -> None:
    from vllm_puzzle.serving.vllm_compat import SUPPORTED_VLLM

    low, high = (".".join(map(str, version)) for version in SUPPORTED_VLLM)
    assert f"vllm>={low},<{high}" in (ROOT / "pyproject.toml").read_text()
    assert f"vLLM >={low},<{high}" in README
