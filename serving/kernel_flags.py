"""Flags that choose between our kernels and vLLM's own path: `auto` where a measured table says ours is faster, `on`
wherever ours can run, `off`.

vLLM's parser must not see them; the server's processes read the environment variable, which also serves `vllm serve`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.cpu_defaults import is_cpu_engine
from vllm_puzzle.serving.own_flags import split_flags

CHOICES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class KernelFlag:
    """One flag of `vllm-puzzle serve` and its variable for plain vLLM."""

    flag: str
    variable: str

    def read(self) -> str:
        """The choice in force: the variable's, `auto` where it is not set. Raises ConfigError for another word."""
        value = os.environ.get(self.variable, "").strip() or "auto"
        if value not in CHOICES:
            raise ConfigError(f"variable {self.variable}: found {value!r}, allowed: {', '.join(CHOICES)}")
        return value


FFN_KERNEL = KernelFlag("--puzzle-ffn-kernel", "VLLM_PUZZLE_FFN_KERNEL")
FLAGS = (FFN_KERNEL,)


def take_kernel_flags(argv: Sequence[str]) -> list[str]:
    """The arguments without these flags, whose values go into the environment.

    Raises ConfigError for a value that is none, and for `on` where no kernel can run.
    """
    flags = {flag.flag: flag for flag in FLAGS}
    rest, given = split_flags(argv, flags.__contains__)
    for one in given:
        value = one.value or ""
        if value not in CHOICES:
            raise ConfigError(f"flag {one.name}: found {value!r}, allowed: {', '.join(CHOICES)}")
        os.environ[flags[one.name].variable] = value
    for flag in FLAGS:
        if flag.read() == "on" and is_cpu_engine() and not os.environ.get("TRITON_INTERPRET"):
            raise ConfigError(f"flag {flag.flag}: found on with a CPU build of vLLM, allowed: auto, off")
    return rest
