"""A case with data: rotating inputs, our op on them, its check against the reference, and the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel.cases import Case
from vllm_puzzle.bench.kernel.timing import Call

# A baseline may quantise its queries or its result (4 % off at most); another function is far beyond this.
BASELINE_BOUND = 0.1


class Absent(Exception):
    """A baseline is not installed, or does not do what the case asks."""


@dataclass(frozen=True, slots=True)
class Check:
    """Distance to the reference on the same inputs, and the most that is allowed."""

    error: float
    bound: float

    @property
    def is_passed(self) -> bool:
        """NaN never passes."""
        return self.error <= self.bound


Prepare = Callable[[], Sequence[Call]]  # one call for each input set; raises Absent


class Problem(Protocol):
    """What the runner needs of an op."""

    case: Case
    config: str  # how our op was configured, known once `ours` was called; empty where there is no choice

    def make(self, num_sets: int) -> None:
        """Draw the inputs of `num_sets` sets."""

    def ours(self) -> Sequence[Call]:
        """Our op, one call for each set."""

    def poison(self, output: Any) -> None:
        """Spoil what the first set's call must write; `output` is what an earlier call returned, None before any."""

    def check(self, output: Any) -> Check:
        """Whether the first set's call computed what the reference computes."""

    def check_baseline(self, output: Any) -> Check:
        """The same for a baseline, whose precision is its own."""

    def baselines(self) -> Mapping[str, Prepare]:
        """Those that may be there, by name."""


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; NaN where any element is."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp_min(1e-300))


def as_bits(cache: Tensor) -> Tensor:
    """The same memory as integers of the same size (torch does not index FP8 everywhere)."""
    return cache.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[cache.element_size()])


@cache
def compiled(function: Callable[..., Any], is_cuda: bool, mode: str = "default") -> Callable[..., Any]:
    """torch.compile on a GPU, the function itself on a CPU (where only its result is tested).

    "dynamic" compiles once for all shapes, as vLLM does. max-autotune goes without torch's own CUDA graphs: the timer
    captures one around all calls.
    """
    if not is_cuda:
        return function
    from torch import _dynamo

    _dynamo.config.cache_size_limit = 256  # one compilation a shape; beyond the limit dynamo runs eagerly
    if mode == "max-autotune":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return torch.compile(function, dynamic=mode == "dynamic")
