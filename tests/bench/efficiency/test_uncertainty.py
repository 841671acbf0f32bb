"""Intervals and verdicts against closed forms and published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from vllm_puzzle.bench.efficiency.resampling import (
    Array,
    Interval,
    normal_quantile,
    percentile_bounds,
    resampled_sums,
    t_quantile,
)
from vllm_puzzle.bench.efficiency.uncertainty import (
    BETTER,
    INCONCLUSIVE,
    NON_INFERIOR,
    WORSE,
    accuracy_difference,
    accuracy_interval,
    block_interval,
    block_spread,
    detectable_difference,
    difference_bounds,
    effective_pairs,
    paired_ratio,
    questions_needed,
    score_bounds,
    size_table,
    verdict,
    wilson,
)


def pairs(wins: int, losses: int, total: int) -> Array:
    """Columns of `total` questions asked once: B alone right, A alone right, and the rest right in both."""
    columns = np.ones((total, 4))
    columns[:wins, 0] = 0
    columns[wins : wins + losses, 2] = 0
    return columns


@pytest.mark.parametrize(
    ("probability", "dof", "value"),
    [
        # Any printed table of Student's t.
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.95, 5, 2.01505), (0.975, 9, 2.26216),
        (0.995, 10, 3.16927), (0.975, 30, 2.04227), (0.975, 120, 1.97993),
    ],
)  # fmt: skip
def test_students_t_equals_the_table(probability: float, dof: int, value: float) -> None:
    assert t_quantile(probability, dof) == pytest.approx(value, rel=5e-6)  # the tables' last digit


def test_students_t_is_continuous_where_its_expansion_takes_over_and_ends_at_the_normal() -> None:
    steps = [t_quantile(0.975, dof) for dof in range(196, 206)]
    changes = np.diff(steps)
    assert np.all(changes < 0) and np.all(np.diff(np.abs(changes)) < 0)
    assert t_quantile(0.975, 10**7) == pytest.approx(normal_quantile(0.975), rel=1e-6)
    assert t_quantile(0.5, 4) == pytest.approx(0, abs=1e-12) and t_quantile(0.975, 0) == math.inf
    with pytest.raises(ValueError, match="probability"):
        t_quantile(0.4, 3)


@pytest.mark.parametrize(("successes", "total"), [(0, 7), (7, 7), (1, 10), (262, 374), (5, 1000)])
def test_wilsons_bounds_solve_its_equation(successes: int, total: int) -> None:
    found = wilson(successes, total)
    z = normal_quantile(0.975)
    for bound in (found.low, found.high):
        # By definition |p̂ − p| = z·√(p(1−p)/n), at 0 and 1 too.
        assert abs(found.estimate - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total), abs=1e-12)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_wilson_of_nothing_knows_nothing_and_of_more_than_all_is_a_mistake() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_a_lone_seventy_percent_of_374_has_four_and_a_half_points_to_either_side() -> None:
    found = wilson(262, 374)
    assert (found.high - found.low) / 2 == pytest.approx(0.046, abs=0.0005)  # as the specification rounds it


def test_repeats_narrow_an_accuracy_only_as_far_as_they_are_independent() -> None:
    asked = np.full(100, 4.0)
    same = np.stack([np.where(np.arange(100) < 60, 4.0, 0.0), asked], axis=1)  # a question's repeats all agree
    mixed = np.stack([np.array([2.0, 3.0] * 40 + [2.0] * 20), asked], axis=1)  # as even as can be
    assert accuracy_interval(same) == wilson(60, 100)
    assert accuracy_interval(mixed) == wilson(240, 400)  # better than independent; no more than the requests
    once = np.stack([np.arange(10) < 4, np.ones(10)], axis=1).astype(float)
    assert accuracy_interval(once) == wilson(4, 10)


def test_resampled_sums_are_multinomial() -> None:
    columns = np.eye(5)
    sums = resampled_sums(columns, 20_000, seed=3)
    assert np.array_equal(sums.sum(axis=1), np.full(20_000, 5.0)), "as many units as there are"
    # Each count is binomial(5, 1/5): mean 1, variance 0.8, covariance −0.2; six standard errors.
    assert np.allclose(sums.mean(axis=0), 1, atol=6 * math.sqrt(0.8 / 20_000))
    assert np.allclose(np.cov(sums.T), np.eye(5) - 0.2, atol=6 * 0.02)


def test_resampling_in_chunks_changes_nothing_but_the_memory() -> None:
    random = np.random.default_rng(0)
    columns = random.random((3000, 2))  # 2^21 / 3000 draws at a time: two chunks of 1,000 draws
    assert np.array_equal(resampled_sums(columns, 1000), resampled_sums(columns[:, None, :], 1000)[:, 0])
    assert not np.array_equal(resampled_sums(columns, 10, seed=1), resampled_sums(columns, 10, seed=2))
    assert np.array_equal(resampled_sums(columns, 10), resampled_sums(columns, 10)), "a seed is a result"


def test_one_unit_bounds_nothing() -> None:
    low, high = percentile_bounds(np.zeros((10, 2)), 1)
    assert np.all(low == -np.inf) and np.all(high == np.inf)
    found = block_interval(np.array([[2.0, 1.0]]))
    assert (found.estimate, found.low, found.high) == (2.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("wins", "losses", "total"), [(0, 0, 44), (1, 0, 44), (9, 3, 32), (0, 12, 100), (40, 25, 533), (3, 3, 7)]
)
def test_the_score_interval_holds_exactly_what_its_test_does_not_reject(wins: int, losses: int, total: int) -> None:
    z = normal_quantile(0.975)

    def statistic(difference: float) -> float:
        # The likelihood's maximum under this difference, found by brute force instead of by its root.
        grid = np.linspace(max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12, 400_001)
        logs = losses * np.log(grid) + (total - wins - losses) * np.log(1 - 2 * grid - difference + 1e-300)
        logs += wins * np.log(np.maximum(grid + difference, 1e-300))
        q = grid[np.argmax(logs)]
        return (wins - losses - total * difference) / math.sqrt(total * (2 * q + difference * (1 - difference)))

    low, high = (float(bound) for bound in score_bounds(*(np.array(float(n)) for n in (wins, losses, total))))
    # The grid's step of 1e-6 in q moves the statistic by less than 1e-3.
    assert statistic(low) == pytest.approx(z, abs=2e-3)
    assert statistic(high) == pytest.approx(-z, abs=2e-3)


def test_where_no_question_tells_the_arms_apart_the_interval_is_that_of_the_score() -> None:
    z2 = normal_quantile(0.975) ** 2
    for total in (100, 1000):
        found = accuracy_difference(pairs(0, 0, total), draws=500)
        assert found.estimate == 0
        assert found.high == -found.low == pytest.approx(z2 / (total + z2), rel=1e-9)  # its closed form
    assert verdict(accuracy_difference(pairs(0, 0, 100)), 0.01) == INCONCLUSIVE
    assert verdict(accuracy_difference(pairs(0, 0, 1000)), 0.01) == NON_INFERIOR


def test_the_paired_interval_agrees_with_the_normal_one_of_many_questions() -> None:
    wins, losses, total = 300, 200, 4000
    found = accuracy_difference(pairs(wins, losses, total))
    mean = (wins - losses) / total
    half = normal_quantile(0.975) * math.sqrt(((wins + losses) / total - mean**2) / total)
    # Monte Carlo error of a 2.5 % percentile of 10,000 draws: √(.025·.975/10,000)/φ(1.96) = 2.7 % of σ; four of them,
    # and the score's z²/n.
    tolerance = 4 * 0.027 * half / 1.96 + 4 / total / 2
    assert found.estimate == pytest.approx(mean, rel=1e-12)
    assert found.low == pytest.approx(mean - half, abs=tolerance)
    assert found.high == pytest.approx(mean + half, abs=tolerance)


def test_the_cluster_is_the_question_and_not_the_request() -> None:
    once = pairs(30, 20, 200)
    copies = once * 8  # eight repeats that all agree say no more than one
    for bound_once, bound_copies in zip(difference_bounds(once), difference_bounds(copies), strict=True):
        assert float(bound_copies) == pytest.approx(float(bound_once), rel=1e-12)
    # Eight repeats that differ as independent ones do: eight times as many pairs.
    random = np.random.default_rng(0)
    columns = np.empty((400, 4))
    columns[:, [1, 3]] = 8
    columns[:, [0, 2]] = random.binomial(8, 0.5, size=(400, 2))
    wins, losses, total = effective_pairs(columns)
    variance = np.square((columns[:, 2] - columns[:, 0]) / 8).mean()
    assert (wins + losses) / total**2 == pytest.approx(variance / 400, rel=1e-12)


def test_the_order_of_arms_turns_the_interval_around() -> None:
    columns = pairs(40, 15, 300)
    forth, back = accuracy_difference(columns), accuracy_difference(columns[:, [2, 3, 0, 1]])
    assert (back.estimate, back.low, back.high) == pytest.approx((-forth.estimate, -forth.high, -forth.low), abs=1e-9)


def test_a_ratio_that_is_the_same_on_every_question_has_no_width() -> None:
    cost = np.random.default_rng(1).lognormal(size=50)
    found = paired_ratio(np.stack([cost, np.ones(50), 0.5 * cost, np.ones(50)], axis=1))
    # Unpaired, the spread of the questions would hide it.
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_blocks_use_students_t_and_print_their_spread() -> None:
    columns = np.array([[90.0, 100.0], [100.0, 100.0], [110.0, 100.0]])
    found = block_interval(columns, draws=40_000)
    logs = np.log([0.9, 1.0, 1.1])
    half = t_quantile(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert found.estimate == pytest.approx(1.0, rel=1e-12)
    # The logarithm of a mean is not the mean of logarithms: a spread of 0.1 makes a difference of its square.
    assert math.log(found.high) == pytest.approx(half, rel=0.03)
    assert math.log(found.low) == pytest.approx(-half, rel=0.03)
    assert block_spread(columns) == pytest.approx(0.2, rel=1e-12)
    with pytest.raises(ValueError, match="nothing ended"):
        block_interval(np.array([[1.0, 0.0], [1.0, 2.0]]))


def test_blocks_are_paired_so_that_a_drift_of_the_machine_cancels() -> None:
    drift = np.array([1.0, 1.3, 0.8, 1.1])
    columns = np.stack([drift, np.ones(4), 0.5 * drift, np.ones(4)], axis=1)
    found = block_interval(columns)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5), rel=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.001, 0.03, BETTER),
        (0.0, 0.03, NON_INFERIOR),
        (-0.0099, 0.02, NON_INFERIOR),
        (-0.0099, -0.001, NON_INFERIOR),  # less, surely, but not by the margin
        (-0.01, 0.02, INCONCLUSIVE),
        (-0.05, 0.05, INCONCLUSIVE),
        (-0.05, -0.01, INCONCLUSIVE),
        (-0.05, -0.0101, WORSE),
    ],
)
def test_the_verdict_follows_from_where_the_whole_interval_lies(low: float, high: float, word: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high), 0.01) == word


def test_a_margin_below_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"found -0\.01"):
        verdict(Interval(0, 0, 0), -0.01)


def test_the_sizes_are_those_of_the_specification() -> None:
    # It rounds (z₁ + z₂)² = 7.8489 to 7.84, and to whole questions.
    wanted = {0.05: [3920, 980, 436], 0.1: [7840, 1960, 871], 0.2: [15680, 3920, 1742]}
    for share, sizes in size_table():
        assert sizes == [pytest.approx(size, abs=1 + 0.0012 * size) for size in wanted[share]]
    assert detectable_difference(0.1, 374) == pytest.approx(0.046, abs=0.0005)


@pytest.mark.parametrize(("discordant", "difference"), [(0.05, 0.01), (0.1, 0.0317), (0.2, 0.03)])
def test_size_and_detectable_difference_are_inverse(discordant: float, difference: float) -> None:
    size = questions_needed(discordant, difference)
    assert detectable_difference(discordant, size) <= difference < detectable_difference(discordant, size - 1)
