"""Means and percentiles of one measured quantity, infinite values included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

PERCENTS = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The p-th percentile: the smallest value that at least p % of all values do not exceed. None of no value.

    The one definition used here (nearest rank, the inverse of the empirical distribution). It is always a value that
    was seen, so values of +∞ (a first answer token that never came) shift it as they should: were they mixed with
    their neighbours they would spread over them, and were they left out the percentile would be one of other requests.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percentile: found {percent}, allowed: above 0, up to 100")
    if not values:
        return None
    # A fraction: 0.07 · 100 in doubles is above 7.
    rank = math.ceil(Fraction(str(percent)) * len(values) / 100)
    return sorted(values)[rank - 1]


def mean(values: Sequence[float]) -> float | None:
    """The mean, infinite when any value is; None of no value."""
    return math.fsum(values) / len(values) if values else None


def maximum(values: Sequence[float]) -> float | None:
    """The largest; None of no value."""
    return max(values, default=None)


def _percentile_of(percent: int) -> Callable[[Sequence[float]], float | None]:
    return lambda values: percentile(values, percent)


# Every per-request quantity is summed up in these ways.
AGGREGATES: Mapping[str, Callable[[Sequence[float]], float | None]] = MappingProxyType(
    {"mean": mean, **{f"p{percent}": _percentile_of(percent) for percent in PERCENTS}, "max": maximum}
)
