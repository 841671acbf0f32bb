"""Cost against accuracy: which settings are worth having, and how much cheaper one model is at the other's accuracy.

A setting is one model, mode, effort or budget under one load. Between neighbours of a frontier cost is interpolated
with accuracy linear in log cost: our choice, since arms differ by factors. (Sending a share of the requests to each of
two settings reaches every accuracy between at a mean cost linear in the share, which is never below it.) A setting that
lies below the line between two others, without being beaten by one, bends the frontier: it was measured, the line was
not. Arrays: the last axis holds the settings of one model, the axes before it any number of resampled cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm_puzzle.bench.efficiency.resampling import (
    CONFIDENCE,
    DRAWS,
    SEED,
    Array,
    Interval,
    percentile_bounds,
    resampled_sums,
)
from vllm_puzzle.bench.efficiency.uncertainty import MARGIN
from vllm_puzzle.model_configs.schema import ConfigError

REFERENCE_COST_FACTOR = 1.1


def _by_cost(cost: Array, accuracy: Array) -> tuple[Array, Array, NDArray[np.intp]]:
    """Sorted by cost, the more accurate first among equals; the third is the order."""
    cost, accuracy = np.broadcast_arrays(np.asarray(cost, np.float64), np.asarray(accuracy, np.float64))
    order = np.lexsort((-accuracy, cost), axis=-1)
    return np.take_along_axis(cost, order, -1), np.take_along_axis(accuracy, order, -1), order


def _best_before(accuracy: Array) -> Array:
    """Per place the highest accuracy of all cheaper settings; −∞ for the first."""
    best = np.maximum.accumulate(accuracy, axis=-1)
    return np.concatenate([np.full_like(best[..., :1], -np.inf), best[..., :-1]], axis=-1)


def non_dominated(cost: Array, accuracy: Array) -> NDArray[np.bool_]:
    """Which settings no other beats: none is as accurate for less, or more accurate for as much. Shape (…, settings).

    Of settings equal in both, one stays.
    """
    _, sorted_accuracy, order = _by_cost(cost, accuracy)
    mask = np.empty(order.shape, dtype=bool)
    np.put_along_axis(mask, order, sorted_accuracy > _best_before(sorted_accuracy), -1)
    return mask


def cost_at(cost: Array, accuracy: Array, level: Array | float) -> Array:
    """The cost of reaching an accuracy along the frontier, shape (…); +∞ where no setting reaches it.

    cost, accuracy: shape (…, settings); level: a shape that broadcasts with theirs less the last axis. Below the least
    accurate setting of the frontier that setting's cost counts: a worse one was not measured.
    """
    level = np.asarray(level, np.float64)[..., None]
    shape = (*np.broadcast_shapes(np.shape(cost)[:-1], level.shape[:-1]), np.shape(cost)[-1])
    cost, accuracy, _ = _by_cost(np.broadcast_to(cost, shape), np.broadcast_to(accuracy, shape))
    reaches = accuracy >= level
    at = np.argmax(reaches, axis=-1, keepdims=True)  # the cheapest that reaches it
    upper_cost, upper = np.take_along_axis(cost, at, -1), np.take_along_axis(accuracy, at, -1)
    # Its neighbour on the frontier: the most accurate of the cheaper ones, and of those the cheapest.
    below = np.take_along_axis(_best_before(accuracy), at, -1)
    neighbour = np.argmax(accuracy == below, axis=-1, keepdims=True)
    lower_cost = np.take_along_axis(cost, neighbour, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(np.isfinite(below), (level - below) / (upper - below), 1.0)
        result = np.exp(np.log(lower_cost) * (1 - part) + np.log(upper_cost) * part)
        result = np.where(part == 1.0, upper_cost, result)
    return np.where(reaches.any(axis=-1, keepdims=True), result, np.inf)[..., 0]


def speed_up(base_cost: Array, base_accuracy: Array, cost: Array, accuracy: Array, level: Array | float) -> Array:
    """S(a) = cost of the baseline at a / cost of the other at a; 0 where the other does not reach a, NaN where the
    baseline does not.
    """
    base = cost_at(base_cost, base_accuracy, level)
    other = cost_at(cost, accuracy, level)
    return np.where(
        np.isfinite(base), np.where(np.isfinite(other), base, 0.0) / np.where(other > 0, other, 1.0), np.nan
    )


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Speed-up at equal accuracy. level: a*; None in `interval` where a* is not reached. reached: part of the
    resampled cases that reach their a*; where that is not all, the lower bound may be 0.
    """

    level: float
    interval: Interval | None
    reached: float

    @property
    def text(self) -> str:
        """For a table."""
        if self.interval is None:
            return f"{self.level:.1%} not reached"
        return f"{self.interval.estimate:.2f}x ({self.interval.low:.2f} … {self.interval.high:.2f}) at {self.level:.1%}"


def costs_and_accuracies(sums: Array) -> tuple[Array, Array]:
    """Sums (…, settings, 4) of correct, issued, cost, completed → cost per completed request and accuracy."""
    cost = np.nan_to_num(sums[..., 2] / sums[..., 3], nan=np.inf, posinf=np.inf)  # nothing completed
    return cost, sums[..., 0] / sums[..., 1]


def speed_up_bounds(
    base: Array, other: Array, margin: float, draws: int, confidence: float, seed: int
) -> tuple[Array, Array, Array, Array, Array]:
    """As `equal_accuracy_speed_up`, of arrays (questions, …, settings, 4): level, estimate, low, high, reached: (…)."""

    def at_level(sums: Array) -> tuple[Array, Array]:
        base_cost, base_accuracy = costs_and_accuracies(sums[..., :split, :])
        cost, accuracy = costs_and_accuracies(sums[..., split:, :])
        level = base_accuracy.max(axis=-1) - margin
        return level, speed_up(base_cost, base_accuracy, cost, accuracy, level)

    split = base.shape[-2]
    columns = np.concatenate([base, other], axis=-2).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        level, estimate = at_level(columns.sum(axis=0))
        _, statistics = at_level(resampled_sums(columns, draws, seed))
    low, high = percentile_bounds(statistics, len(columns), confidence)
    return level, estimate, low, high, (statistics > 0).mean(axis=0)


def equal_accuracy_speed_up(
    base: Array,
    other: Array,
    margin: float = MARGIN,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> SpeedUp:
    """S(a*) with a bootstrap over questions, at a* = best accuracy of the baseline − margin.

    base, other: shape (questions, settings, 4): correct, issued, cost, completed, the same questions in both. Each
    resampled case finds its own a* and frontiers. A case that does not reach its a* counts as 0: an infinite cost.
    """
    level, estimate, low, high, reached = speed_up_bounds(base, other, margin, draws, confidence, seed)
    found = Interval(float(estimate), float(low), float(high), confidence) if estimate > 0 else None
    return SpeedUp(float(level), found, float(reached))


def mean_speed_up(base_cost: Array, base_accuracy: Array, cost: Array, accuracy: Array) -> float | None:
    """Geometric mean of S(a) over all accuracies that both frontiers span, exactly; None where they share none.

    One case: arrays of shape (settings,). log S is linear between the accuracies of the frontiers' settings.
    """
    masks = non_dominated(base_cost, base_accuracy), non_dominated(cost, accuracy)
    levels = np.asarray(base_accuracy, np.float64)[masks[0]], np.asarray(accuracy, np.float64)[masks[1]]
    low, high = max(found.min() for found in levels), min(found.max() for found in levels)
    if low >= high:
        return None
    knots = np.unique(np.concatenate([*levels, [low, high]]).clip(low, high))
    logs = np.log(speed_up(base_cost, base_accuracy, cost, accuracy, knots))
    return math.exp(float(np.sum(np.diff(knots) * (logs[1:] + logs[:-1]) / 2) / (high - low)))


@dataclass(frozen=True, slots=True)
class Reference:
    """The declared corner of a hypervolume: a cost that is too high and an accuracy that is for nothing (chance).
    best_cost: the opposite corner, with accuracy 1.
    """

    cost: float
    accuracy: float
    best_cost: float

    def __post_init__(self) -> None:
        if not (0 < self.best_cost < self.cost and 0 <= self.accuracy < 1):
            raise ConfigError(
                f"hypervolume reference: found cost {self.cost}, best cost {self.best_cost}, accuracy {self.accuracy}, "
                "allowed: 0 < best cost < cost, 0 ≤ accuracy < 1"
            )

    @classmethod
    def of(cls, base_cost: Array, all_costs: Array, chance: float) -> Reference:
        """The rule: 1.1 times the cost of the slowest setting of the baseline, chance; the cheapest of all settings."""
        return cls(float(np.max(base_cost)) * REFERENCE_COST_FACTOR, chance, float(np.min(all_costs)))

    def to_object(self) -> Mapping[str, Any]:
        """For a report."""
        return {"cost": self.cost, "accuracy": self.accuracy, "best_cost": self.best_cost}


def hypervolume(cost: Array, accuracy: Array, reference: Reference) -> Array:
    """Part of the rectangle (log cost × accuracy) between the reference's corners that settings dominate, shape (…).

    Steps, without interpolation. Secondary: it depends on the corner, which is why that is declared.
    """
    cost, accuracy, _ = _by_cost(cost, accuracy)
    logs = np.log(np.clip(cost, reference.best_cost, reference.cost))
    width = np.log(reference.cost) - logs
    before = np.maximum(_best_before(accuracy), reference.accuracy)
    area = (width * np.maximum(accuracy - before, 0)).sum(axis=-1)
    return area / ((math.log(reference.cost) - math.log(reference.best_cost)) * (1 - reference.accuracy))
