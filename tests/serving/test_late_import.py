"""An action on a module that nobody has imported yet."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from vllm_puzzle.serving.late_import import when_imported


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"late_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_the_action_waits_for_the_import_and_sees_the_whole_module(module_name: str) -> None:
    seen: list[int] = []

    def act(module: ModuleType) -> None:
        seen.append(module.value)
        module.value = 4

    finders = list(sys.meta_path)
    when_imported(module_name, act)
    when_imported(module_name, act)
    assert seen == [] and module_name not in sys.modules and len(sys.meta_path) == len(finders) + 1
    assert importlib.import_module(module_name).value == 4
    assert seen == [3] and sys.meta_path == finders


def test_a_module_that_is_there_is_acted_on_at_once(module_name: str) -> None:
    module, seen = importlib.import_module(module_name), []
    when_imported(module_name, seen.append)
    assert seen == [module]


def test_a_module_that_does_not_exist_still_fails_as_it_would() -> None:
    when_imported("no_such_module_anywhere", print)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")


def test_the_v2_sampler_gets_our_class_and_nobody_imports_it_for_that() -> None:
    program = (
        "import sys, vllm.config\n"
        "from vllm_puzzle.serving.vllm_compat import enforce_thinking_budgets_v2\n"
        "enforce_thinking_budgets_v2(); enforce_thinking_budgets_v2()\n"
        "assert not [name for name in sys.modules if name.startswith('vllm.v1.worker.gpu.')]\n"
        "import vllm.v1.worker.gpu.sample.sampler as sampler\n"
        "print(sampler.ThinkingBudgetState.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1:] == ["vllm_puzzle.serving.thinking_v2"], done.stderr[-2000:]
