"""Whether a window was steady: trends of what was in flight and of how long requests took. NumPy only.

The window is cut into ten slices. A trend is called one when it is large (a fifth of the mean from end to end) and not
by chance (Kendall's test over the slices, p < 1 %): a queue that grows, or a server that heats up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vllm_puzzle.bench.efficiency.record import RequestRecord

SLICES = 10
LARGE = 0.2
Z = 2.576  # two-sided 1 %
STEADY, DRIFTING, SHORT = "stationary", "drifting", "too short to tell"
MIN_REQUESTS = 3 * SLICES


@dataclass(frozen=True, slots=True)
class Trend:
    """change: from the first to the last slice along the fitted line, as a share of the mean. z: Kendall's test."""

    change: float
    z: float

    @property
    def is_real(self) -> bool:
        """Whether it is large and not by chance."""
        return abs(self.change) > LARGE and abs(self.z) > Z


def trend(values: Sequence[float]) -> Trend:
    """Of values at equal distances."""
    data = np.asarray(values, dtype=np.float64)
    count, mean = len(data), float(np.mean(data))
    slope = float(np.polyfit(np.arange(count), data, 1)[0])
    score = sum(int(np.sign(data[j] - data[i])) for i in range(count) for j in range(i + 1, count))
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    corrected = (abs(score) - 1) / deviation if score else 0.0
    return Trend(slope * (count - 1) / mean if mean else 0.0, math.copysign(corrected, score))


def stationarity(records: Sequence[RequestRecord], start: float, end: float) -> dict[str, Any]:
    """The verdict with its two trends, over the window from `start` to `end`; all requests count as in flight."""
    begun = [record for record in records if start <= record.start < end]
    if len(begun) < MIN_REQUESTS or not start < end:
        return {"label": SHORT, "in_flight": None, "latency": None, "requests": len(begun)}
    edges = np.linspace(start, end, SLICES + 1)
    in_flight = trend([_mean_in_flight(records, low, high) for low, high in itertools.pairwise(edges)])
    by_start = sorted(begun, key=lambda record: record.start)
    parts = np.array_split(np.array([record.done - record.start for record in by_start]), SLICES)
    latency = trend([float(np.mean(part)) for part in parts])
    is_drifting = in_flight.is_real or latency.is_real
    return {
        "label": DRIFTING if is_drifting else STEADY,
        "in_flight": asdict(in_flight) | {"is_real": in_flight.is_real},
        "latency": asdict(latency) | {"is_real": latency.is_real},
        "requests": len(begun),
    }


def _mean_in_flight(records: Sequence[RequestRecord], low: float, high: float) -> float:
    """Time average; who waits for a slot of an open load is in flight too."""
    inside = (max(0.0, min(high, record.done) - max(low, record.start)) for record in records)
    return math.fsum(inside) / (high - low)
