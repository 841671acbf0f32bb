"""Frontiers against cases worked out by hand, and against a slow definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hand_made import unhurried
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_puzzle.bench.efficiency.frontier import (
    Reference,
    cost_at,
    equal_accuracy_speed_up,
    hypervolume,
    mean_speed_up,
    non_dominated,
    speed_up,
)
from vllm_puzzle.model_configs.schema import ConfigError

# The frontier is 1, 4, 16; 8 is beaten by 4, and 20 by 16.
COST = np.array([4.0, 1.0, 16.0, 8.0, 20.0])
ACCURACY = np.array([0.6, 0.4, 0.8, 0.5, 0.8])

points = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 16)).map(lambda point: (float(point[0]), point[1] / 16)),
    min_size=1,
    max_size=7,
)


def arrays(found: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    cost, accuracy = np.array(found).T
    return cost, accuracy


def test_the_frontier_is_what_nothing_beats() -> None:
    assert non_dominated(COST, ACCURACY).tolist() == [True, True, True, False, False]
    assert non_dominated(np.array([2.0, 2.0, 2.0]), np.array([0.4, 0.5, 0.5])).tolist() == [False, True, False]


@unhurried
@given(points)
def test_the_frontier_equals_its_definition(found: list[tuple[float, float]]) -> None:
    cost, accuracy = arrays(found)
    mask = non_dominated(cost, accuracy)
    for one, kept in zip(found, mask, strict=True):
        beaten = any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in found)
        assert not (kept and beaten)
    # Of equal settings one stays, and every other is beaten by one that stays.
    assert len({one for one, kept in zip(found, mask, strict=True) if kept}) == mask.sum()
    for one in found:
        assert any(kept and o[0] <= one[0] and o[1] >= one[1] for o, kept in zip(found, mask, strict=True))


@pytest.mark.parametrize(
    ("level", "cost"),
    [
        (0.8, 16.0),
        (0.7, 8.0),  # half way from 4 to 16 in log cost
        (0.65, 4 * 4**0.25),
        (0.6, 4.0),
        (0.5, 2.0),  # not the 8 of the setting that was beaten
        (0.4, 1.0),
        (0.1, 1.0),  # nothing cheaper was measured
        (0.81, math.inf),
    ],
)
def test_cost_is_interpolated_in_its_logarithm(level: float, cost: float) -> None:
    assert cost_at(COST, ACCURACY, level) == pytest.approx(cost, rel=1e-12)


@unhurried
@given(points, st.integers(0, 16).map(lambda n: n / 16), st.integers(0, 16).map(lambda n: n / 16))
def test_more_accuracy_never_costs_less(found: list[tuple[float, float]], one: float, other: float) -> None:
    cost, accuracy = arrays(found)
    low, high = sorted((one, other))
    assert cost_at(cost, accuracy, low) <= cost_at(cost, accuracy, high) * (1 + 1e-12)


@unhurried
@given(points, st.tuples(st.integers(1, 64), st.integers(0, 16)), st.integers(0, 16))
def test_one_setting_more_never_raises_the_cost_nor_lowers_the_hypervolume(
    found: list[tuple[float, float]], extra: tuple[int, int], level: int
) -> None:
    before, after = arrays(found), arrays([*found, (float(extra[0]), extra[1] / 16)])
    # At an accuracy that a setting has; on a line between two, a neighbour below it rightly raises the cost.
    exact = before[1][level % len(before[1])]
    cheapest = before[0][before[1] >= exact].min()
    assert cost_at(*after, exact) <= cheapest * (1 + 1e-12)
    reference = Reference(70.0, 0.0, 0.5)
    assert hypervolume(*after, reference) >= hypervolume(*before, reference) - 1e-12
    assert 0 <= hypervolume(*after, reference) <= 1


def test_the_speed_up_is_a_quotient_of_costs_at_one_accuracy() -> None:
    assert speed_up(COST, ACCURACY, COST / 2, ACCURACY, 0.7) == pytest.approx(2.0)
    # The same settings, but two points more of accuracy each: cheaper at equal accuracy though not at equal setting.
    assert speed_up(COST, ACCURACY, COST, ACCURACY + 0.02, 0.6) == pytest.approx(4**0.1, rel=1e-9)
    assert speed_up(COST, ACCURACY, COST, ACCURACY - 0.2, 0.8) == 0, "not reached by the other"
    assert np.isnan(speed_up(COST, ACCURACY, COST, ACCURACY, 0.9)), "not reached by the baseline"


def test_many_cases_at_once_are_the_cases_one_by_one() -> None:
    random = np.random.default_rng(0)
    cost, accuracy = random.integers(1, 9, (40, 6)).astype(float), random.integers(0, 9, (40, 6)) / 8
    levels = random.integers(0, 9, 40) / 8
    alone = [float(cost_at(*case)) for case in zip(cost, accuracy, levels, strict=True)]
    assert np.array_equal(cost_at(cost, accuracy, levels), alone)
    masks = [non_dominated(*case) for case in zip(cost, accuracy, strict=True)]
    assert np.array_equal(non_dominated(cost, accuracy), masks)


def test_the_mean_speed_up_is_over_the_accuracies_of_both() -> None:
    assert mean_speed_up(COST, ACCURACY, COST / 3, ACCURACY) == pytest.approx(3.0)
    assert mean_speed_up(COST, ACCURACY, COST, ACCURACY + 0.5) is None, "no accuracy in common"
    other = np.array([2.0, 4.0]), np.array([0.5, 0.7])
    # log2 S from 0.5 to 0.7: base 1 → 2 → 3, other 1 → 1.5 → 2; the difference rises from 0 over 0.5 to 1.
    assert mean_speed_up(COST, ACCURACY, *other) == pytest.approx(math.sqrt(2))


def test_the_mean_speed_up_equals_a_fine_sum() -> None:
    other_cost, other_accuracy = np.array([0.7, 2.0, 5.0, 9.0]), np.array([0.45, 0.52, 0.71, 0.77])
    levels = np.linspace(0.45, 0.77, 200_001)
    fine = np.log([speed_up(COST, ACCURACY, other_cost, other_accuracy, level) for level in levels[::200]])
    assert mean_speed_up(COST, ACCURACY, other_cost, other_accuracy) == pytest.approx(
        math.exp(np.trapezoid(fine) / (len(fine) - 1)), rel=1e-5
    )  # a thousand steps of a function with few kinks


def test_the_hypervolume_is_the_area_of_steps() -> None:
    reference = Reference(16.0, 0.25, 1.0)
    # Of four doublings × 0.75: 0.4 from cost 1 on, 0.6 from 4 on, 0.8 from 16 on.
    assert hypervolume(COST, ACCURACY, reference) == pytest.approx((4 * 0.15 + 2 * 0.2) / (4 * 0.75))
    assert hypervolume(np.array([1.0]), np.array([1.0]), reference) == pytest.approx(1.0)
    assert hypervolume(np.array([32.0]), np.array([1.0]), reference) == 0
    assert Reference.of(COST, np.array([0.5, 4.0]), 0.25) == Reference(22.0, 0.25, 0.5)
    with pytest.raises(ConfigError, match=r"cost 1\.0, best cost 2\.0"):
        Reference(1.0, 0.0, 2.0)


def columns(accuracies: list[float], costs: list[float], questions: int = 200) -> np.ndarray:
    """Every setting knows the first questions."""
    found = np.ones((questions, len(costs), 4))
    found[..., 0] = np.arange(questions)[:, None] < np.array(accuracies) * questions
    found[..., 2] = costs
    return found


def test_the_speed_up_at_equal_accuracy_is_at_the_best_of_the_baseline_less_the_margin() -> None:
    base = columns([0.4, 0.6, 0.8], [1.0, 4.0, 16.0])
    found = equal_accuracy_speed_up(base, columns([0.4, 0.6, 0.8], [0.5, 2.0, 8.0]), 0.1, draws=500)
    assert found.level == pytest.approx(0.7) and found.interval is not None and found.reached == 1.0
    # Half the cost on every question and the same answers: no draw can tell otherwise.
    assert (found.interval.low, found.interval.high) == pytest.approx((2.0, 2.0))
    assert found.text == "2.00x (2.00 … 2.00) at 70.0%"


def test_an_accuracy_out_of_reach_is_said_to_be() -> None:
    base = columns([0.4, 0.8], [1.0, 16.0])
    far = equal_accuracy_speed_up(base, columns([0.4, 0.6], [0.1, 0.2]), 0.01, draws=500)
    assert far.interval is None and far.text == "79.0% not reached"
    near = equal_accuracy_speed_up(base, columns([0.4, 0.79], [0.5, 8.0]), 0.01, draws=500)
    assert near.interval is not None and 0 < near.reached < 1
    assert near.interval.low == 0, "where some cases do not reach it, no speed-up is sure"


@settings(unhurried, max_examples=30)
@given(st.floats(0.1, 10))
def test_the_unit_of_cost_does_not_matter(unit: float) -> None:
    base, other = columns([0.4, 0.8], [1.0, 16.0]), columns([0.5, 0.9], [1.0, 9.0])
    scaled = [part * np.array([1, 1, unit, 1]) for part in (base, other)]
    first, second = (equal_accuracy_speed_up(*pair, 0.05, draws=50).interval for pair in ((base, other), scaled))
    assert first is not None and second is not None
    assert (second.estimate, second.low, second.high) == pytest.approx((first.estimate, first.low, first.high))
