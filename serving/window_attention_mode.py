"""Which layers are to take our window attention: the flag, its variable, and what follows before vLLM is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.cpu_defaults import is_cpu_engine
from vllm_puzzle.serving.own_flags import split_flags

FLAG = "--puzzle-window-attention"
VARIABLE = "VLLM_PUZZLE_WINDOW_ATTENTION"
AUTO, ON, OFF = MODES = ("auto", "on", "off")


def take_window_attention(argv: Sequence[str]) -> list[str]:
    """The arguments without the flag, whose value becomes the variable's; ConfigError for another value."""
    rest, given = split_flags(argv, FLAG.__eq__)
    for one in given:
        os.environ[VARIABLE] = _checked(f"flag {FLAG}", one.value or "")
    if window_attention_mode() == ON and not can_run():
        raise ConfigError(f"flag {FLAG}: found {ON}, allowed: {AUTO} or {OFF} (its kernels run on NVIDIA GPUs)")
    return rest


def window_attention_mode() -> str:
    """auto (where a table measured on this device says that it is not slower), on or off."""
    return _checked(f"variable {VARIABLE}", os.environ.get(VARIABLE) or AUTO)


def _checked(where: str, value: str) -> str:
    if value not in MODES:
        raise ConfigError(f"{where}: found {value!r}, allowed: {', '.join(MODES)}")
    return value


def is_interpreting() -> bool:
    """Whether Triton computes kernels in NumPy, which is how they run on a CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_run() -> bool:
    """Whether this vLLM has a device for the kernels, told without importing it."""
    return not is_cpu_engine() or is_interpreting()


def serves_sink_tokens() -> bool:
    """Whether layers that keep the first tokens in view have a backend: ours, where it is on and can run."""
    return window_attention_mode() == ON and can_run()
