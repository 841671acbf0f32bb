"""Sums over independent units that are drawn again with replacement, and intervals from them.

The unit is what is independent: a question with all its repeats, or a block of time. Everything is seeded and works on
whole arrays: between the first axis (units or draws) and the last (columns of one statistic) there may be others, for
many statistics at once. NumPy and the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 10_000
SEED = 2026
_CHUNK = 2**21  # weights held at once: 16 MiB
_EXACT_DOF = 200  # beyond it the expansion in 1/ν errs below 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between two bounds. `confidence` is two-sided: each bound fails with half of the rest."""

    estimate: float
    low: float
    high: float
    confidence: float = CONFIDENCE


def normal_quantile(probability: float) -> float:
    """The standard normal value below which a `probability` of it lies."""
    return NormalDist().inv_cdf(probability)


@lru_cache(maxsize=256)
def t_quantile(probability: float, dof: int) -> float:
    """Student's t for whole degrees of freedom, 0.5 ≤ probability < 1; infinite without any degree of freedom.

    Finite series (Abramowitz & Stegun 26.7.3, 26.7.4), inverted by bisection.
    """
    if not 0.5 <= probability < 1:
        raise ValueError(f"t_quantile, probability: found {probability}, allowed: from 0.5 to below 1")
    if dof < 1:
        return math.inf
    if dof > _EXACT_DOF:
        return _t_expansion(normal_quantile(probability), dof)
    low, high = 0.0, 1.0
    while _t_central(high, dof) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, dof) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_central(t: float, dof: int) -> float:
    """The probability of lying between −t and t."""
    angle = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1, (dof - odd) // 2 + 1):
        total += term
        term *= cosine * cosine * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def _t_expansion(z: float, dof: int) -> float:
    """Abramowitz & Stegun 26.7.5."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / dof + second / dof**2 + third / dof**3


def resampled_sums(columns: Array, draws: int = DRAWS, seed: int = SEED) -> Array:
    """Sums over units drawn with replacement.

    columns: shape (units, …). Returns shape (draws, …): each row sums as many units as there are, drawn anew. All
    columns of a draw use the same units, which is what pairs them.
    """
    units = len(columns)
    flat = np.asarray(columns, dtype=np.float64).reshape(units, -1)
    random = np.random.default_rng(seed)
    sums = np.empty((draws, flat.shape[1]))
    step = max(1, _CHUNK // units)
    for first in range(0, draws, step):
        rows = min(step, draws - first)
        picks = random.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        weights = np.bincount(picks.ravel(), minlength=rows * units).reshape(rows, units)
        sums[first : first + rows] = weights.astype(np.float64) @ flat
    return sums.reshape(draws, *np.shape(columns)[1:])


def percentile_bounds(statistics: Array, units: int, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """Percentile interval of resampled statistics, shape (draws, …), widened for few units.

    Plain percentiles are too narrow, by √((n−1)/n) and by the normal where Student's t belongs; moving both levels
    outward mends it (Hesterberg 2015, "expanded percentile"). Returns the two bounds, shape (…).
    """
    if units < 2:
        unbounded = np.full(statistics.shape[1:], np.inf)
        return -unbounded, unbounded
    reach = math.sqrt(units / (units - 1)) * t_quantile((1 + confidence) / 2, units - 1)
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(statistics, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return low, high


def log_reach(logarithms: Array, units: int, confidence: float = CONFIDENCE) -> Array:
    """How far the logarithm of a quantity reaches to either side, from its resampled values, shape (draws, …).

    For a handful of units: percentiles of three blocks cannot leave the three values seen; their standard error times
    Student's t with units − 1 degrees of freedom can. Returns shape (…).
    """
    if units < 2:
        return np.full(logarithms.shape[1:], np.inf)
    return t_quantile((1 + confidence) / 2, units - 1) * math.sqrt(units / (units - 1)) * logarithms.std(axis=0)


def mean_reach(values: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """How far a mean reaches to either side: Student's interval of independent values; infinite for a single one."""
    if len(values) < 2:
        return math.inf
    return t_quantile((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def geometric_mean(logarithms: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Of ratios whose logarithms these are, with Student's interval; from 0 to infinity for a single one."""
    middle, reach = fmean(logarithms), mean_reach(logarithms, confidence)
    return Interval(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), confidence)


def bootstrap(
    columns: Array,
    statistic: Callable[[Array], Array],
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> tuple[Array, Array, Array]:
    """Percentile bootstrap of a function of sums: estimate, low, high, each of shape (…).

    columns: shape (units, …, k). statistic: turns sums of shape (…, k) into values of shape (…).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = statistic(np.asarray(columns, dtype=np.float64).sum(axis=0))
        low, high = percentile_bounds(statistic(resampled_sums(columns, draws, seed)), len(columns), confidence)
    return estimate, low, high


def ratio(sums: Array) -> Array:
    """Columns (numerator, denominator) → their quotient."""
    return sums[..., 0] / sums[..., 1]


def difference_of_ratios(sums: Array) -> Array:
    """Columns (numerator A, denominator A, numerator B, denominator B) → B's quotient minus A's."""
    return sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]


def ratio_of_ratios(sums: Array) -> Array:
    """Columns (numerator A, denominator A, numerator B, denominator B) → B's quotient over A's."""
    return (sums[..., 2] / sums[..., 3]) / (sums[..., 0] / sums[..., 1])
