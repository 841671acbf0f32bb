"""How sure a comparison is: intervals for accuracy, cost and time, the verdict, and how many questions it takes.

Questions are the units of resampling, with their repeats inside (Miller 2024, arXiv 2411.00640); for noise in time the
unit is the block of an interleaved sweep. Columns (numerator, denominator) are sums per unit, so that a unit that an
arm asked more often weighs more, as in accuracy = correct / issued.
"""

from __future__ import annotations

import math

import numpy as np
from vllm_puzzle.bench.efficiency.resampling import (
    CONFIDENCE,
    DRAWS,
    SEED,
    Array,
    Interval,
    bootstrap,
    difference_of_ratios,
    log_reach,
    normal_quantile,
    ratio,
    ratio_of_ratios,
    resampled_sums,
)

BETTER, NON_INFERIOR, INCONCLUSIVE, WORSE = "better", "non-inferior", "inconclusive", "worse"
VERDICTS = (BETTER, NON_INFERIOR, INCONCLUSIVE, WORSE)

MARGIN = 0.01  # one point of accuracy
POWER = 0.8
MIN_BLOCKS = 3


def wilson(successes: float, total: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's interval of a lone proportion (E. B. Wilson 1927). Of no trial nothing is known: 0 to 1.

    Counts may be effective ones, with fractions.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"wilson: found {successes} successes of {total}, allowed: 0 to the total")
    if total == 0:
        return Interval(math.nan, 0.0, 1.0, confidence)
    z = normal_quantile((1 + confidence) / 2)
    share, square = successes / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    # At 0 and at 1 the bound is exactly that; only rounding would say otherwise.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Interval(share, low, high, confidence)


def accuracy_interval(columns: Array, confidence: float = CONFIDENCE) -> Interval:
    """One arm's accuracy; columns: shape (questions, 2), correct and issued.

    Wilson's interval; with repeats, of as many independent trials as would spread as the questions do (Rao & Scott
    1992): no fewer than the questions, no more than the requests.
    """
    columns = np.asarray(columns, dtype=np.float64)
    correct, issued = (float(total) for total in columns.sum(axis=0))
    questions = len(columns)
    accuracy = correct / issued
    # Variance of a quotient of sums, by linearisation.
    squares = float(np.square(columns[:, 0] - accuracy * columns[:, 1]).sum())
    variance = squares / issued**2 * questions / max(1, questions - 1)
    trials = accuracy * (1 - accuracy) / variance if variance > 0 else questions
    trials = min(max(trials, questions), issued)
    return wilson(accuracy * trials, trials, confidence)


def difference_bounds(
    columns: Array, *, draws: int = DRAWS, confidence: float = CONFIDENCE, seed: int = SEED
) -> tuple[Array, Array, Array]:
    """Paired difference of accuracy, B − A: estimate, low, high, each of shape (…).

    columns: shape (questions, …, 4): correct and issued of A, correct and issued of B. A bootstrap over questions,
    held against a score interval: where hardly any question tells the arms apart, resampling finds hardly any spread
    and would call arms equal of which nothing is known. Each bound is the outer one of both.
    """
    columns = np.asarray(columns, dtype=np.float64)
    estimate, low, high = bootstrap(columns, difference_of_ratios, draws=draws, confidence=confidence, seed=seed)
    wins, losses, pairs = effective_pairs(columns)
    score_low, score_high = score_bounds(wins, losses, pairs, confidence)
    return estimate, np.minimum(low, score_low), np.maximum(high, score_high)


def accuracy_difference(
    columns: Array, *, draws: int = DRAWS, confidence: float = CONFIDENCE, seed: int = SEED
) -> Interval:
    """`difference_bounds` of one pair of arms; columns: shape (questions, 4)."""
    estimate, low, high = difference_bounds(columns, draws=draws, confidence=confidence, seed=seed)
    return Interval(float(estimate), float(low), float(high), confidence)


def effective_pairs(columns: Array) -> tuple[Array, Array, Array]:
    """Wins of B, losses of B and pairs: as many independent pairs as would spread as the questions do.

    columns: as in `difference_bounds`. With one repeat these are the plain counts. With r repeats a question's
    difference is a fraction, and up to r times as many pairs carry the same mean and variance (Rao & Scott 1992).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.nan_to_num(columns[..., 2] / columns[..., 3] - columns[..., 0] / columns[..., 1])
        wins, losses = np.maximum(difference, 0).sum(axis=0), np.maximum(-difference, 0).sum(axis=0)
        scale = np.nan_to_num((wins + losses) / np.square(difference).sum(axis=0), nan=1.0)
    repeats = np.minimum(columns[..., 1], columns[..., 3]).mean(axis=0)
    scale = np.clip(scale, 1.0, np.maximum(repeats, 1.0))
    return wins * scale, losses * scale, len(columns) * scale


def score_bounds(wins: Array, losses: Array, pairs: Array, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """Score interval of the difference (wins − losses) / pairs of paired proportions (T. Tango 1998), shape (…)."""
    z = normal_quantile((1 + confidence) / 2)
    low = _score_low(wins, losses, pairs, z)
    return low, -_score_low(losses, wins, pairs, z)


def _score_low(wins: Array, losses: Array, pairs: Array, z: float) -> Array:
    """The smallest difference that the score test does not reject, by bisection (the score falls with it)."""
    low, high = -np.ones_like(pairs), (wins - losses) / pairs
    for _ in range(60):
        middle = (low + high) / 2
        # Likelihood of the losses' share q at this difference: the root of 2n·q² + b·q + c.
        b = -wins - losses + (2 * pairs - wins + losses) * middle
        c = -losses * middle * (1 - middle)
        q = (np.sqrt(np.maximum(b * b - 8 * pairs * c, 0)) - b) / (4 * pairs)
        variance = pairs * (2 * q + middle * (1 - middle))
        rejected = wins - losses - pairs * middle > z * np.sqrt(np.maximum(variance, 0))
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


def paired_ratio(columns: Array, *, draws: int = DRAWS, confidence: float = CONFIDENCE, seed: int = SEED) -> Interval:
    """B's mean over A's mean, by question; columns: shape (questions, 4), sums and counts of A, then of B."""
    estimate, low, high = bootstrap(columns, ratio_of_ratios, draws=draws, confidence=confidence, seed=seed)
    return Interval(float(estimate), float(low), float(high), confidence)


def block_bounds(
    columns: Array, *, draws: int = DRAWS, confidence: float = CONFIDENCE, seed: int = SEED
) -> tuple[Array, Array, Array]:
    """A rate or cost, or its ratio B over A, resampled by blocks of time: estimate, low, high, each of shape (…).

    columns: shape (blocks, …, 2) or (blocks, …, 4), positive; block i of both arms ran side by side. Works on the
    logarithm; fewer than two blocks bound nothing.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if not np.all(columns > 0):
        raise ValueError("block bootstrap: found a block in which nothing ended, allowed: positive sums in each")
    statistic = ratio if columns.shape[-1] == 2 else ratio_of_ratios
    estimate = statistic(columns.sum(axis=0))
    reach = log_reach(np.log(statistic(resampled_sums(columns, draws, seed))), len(columns), confidence)
    return estimate, estimate * np.exp(-reach), estimate * np.exp(reach)


def block_interval(columns: Array, *, draws: int = DRAWS, confidence: float = CONFIDENCE, seed: int = SEED) -> Interval:
    """`block_bounds` of one quantity; columns: shape (blocks, 2) or (blocks, 4)."""
    estimate, low, high = block_bounds(columns, draws=draws, confidence=confidence, seed=seed)
    return Interval(float(estimate), float(low), float(high), confidence)


def block_spread(columns: Array) -> float:
    """Between-block spread of a quotient: (largest − smallest) / quotient of the sums; columns: shape (blocks, 2)."""
    values = ratio(np.asarray(columns, dtype=np.float64))
    return float((values.max() - values.min()) / ratio(np.asarray(columns).sum(axis=0)))


def verdict(difference: Interval, margin: float = MARGIN) -> str:
    """One of VERDICTS about B − A (more is better), `margin` ≥ 0 in the same unit, declared beforehand.

    better: above 0; non-inferior: above −margin; worse: below −margin; inconclusive: else. Each holds for the whole
    interval, so at 95 % each is said wrongly with at most 2.5 %: `better` of equal arms, `non-inferior` or `worse` of
    an arm that lies at the margin exactly.
    """
    if margin < 0:
        raise ValueError(f"verdict, margin: found {margin}, allowed: 0 or more")
    if difference.low > 0:
        return BETTER
    if difference.low > -margin:
        return NON_INFERIOR
    return WORSE if difference.high < -margin else INCONCLUSIVE


def questions_needed(discordant: float, difference: float, power: float = POWER, confidence: float = CONFIDENCE) -> int:
    """Questions for which a paired accuracy difference is found with this power, two-sided.

    discordant: share of questions on which the arms differ. (z₁ + z₂)² · discordant / difference²; with z rounded to
    1.96 and 0.84 that is the 7.84 of common tables.
    """
    reach = normal_quantile((1 + confidence) / 2) + normal_quantile(power)
    return math.ceil(reach * reach * discordant / difference**2 - 1e-9)


def detectable_difference(
    discordant: float, questions: int, power: float = POWER, confidence: float = CONFIDENCE
) -> float:
    """The smallest paired accuracy difference that so many questions find with this power."""
    reach = normal_quantile((1 + confidence) / 2) + normal_quantile(power)
    return reach * math.sqrt(discordant / questions)


def size_table(
    discordants: tuple[float, ...] = (0.05, 0.1, 0.2), differences: tuple[float, ...] = (0.01, 0.02, 0.03)
) -> list[tuple[float, list[int]]]:
    """Per discordant share the questions needed for each difference."""
    return [(share, [questions_needed(share, points) for points in differences]) for share in discordants]
