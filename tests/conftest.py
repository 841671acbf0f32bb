"""Shared by all tests: no network, caches of their own, and a summary of what was skipped (pytest -ra)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import beside

# Before anything imports vLLM or torch: no hub, no spinning threads, no cache shared with the user's runs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; the summary names each."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the long scripts of the modules that were selected, unless they were only to be listed."""
    if session.config.option.collectonly:
        return
    modules = dict.fromkeys(item.getparent(pytest.Module) for item in session.items if "gpu" not in item.keywords)
    for module in modules:
        beside.start(getattr(getattr(module, "obj", None), "BESIDE", ()))


def pytest_sessionfinish() -> None:
    """Start no further script."""
    beside.stop()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN, so that a value nobody wrote shows."""
    import torch

    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)
