"""What a metric of a run is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.record import RequestRecord


@dataclass(frozen=True, slots=True)
class Metric:
    """One quantity of a run. `compute` gives None where it does not exist or nobody can tell, +∞ for a cost per
    nothing or a wait without end.
    """

    name: str
    formula: str
    unit: str
    compute: Callable[[Sequence[RequestRecord], RunFacts], float | None]
