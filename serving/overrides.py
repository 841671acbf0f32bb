"""Taking the place of a model class that vLLM has: said once per process, and switched off by one variable."""

from __future__ import annotations

import logging
import os

DISABLE_OVERRIDES = "VLLM_PUZZLE_DISABLE_OVERRIDES"
_said: set[str] = set()


def keeps_stock() -> bool:
    """Whether the user keeps vLLM's own classes."""
    return os.environ.get(DISABLE_OVERRIDES, "0") not in ("", "0")


def say_once(level: int, message: str) -> None:
    """Log under vLLM's root, so that its level and format apply."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("vllm.puzzle").log(level, "vllm-puzzle: %s", message)
