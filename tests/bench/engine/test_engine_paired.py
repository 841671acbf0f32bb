"""Blocks of two engines: a drift cancels, the interval covers as often as it says, the whole of it decides."""

from __future__ import annotations

import math
import random

import pytest
from vllm_puzzle.bench.efficiency.resampling import mean_reach
from vllm_puzzle.bench.engine.paired import (
    MET,
    MISSED,
    OPEN,
    UNJUDGED,
    A,
    B,
    Comparison,
    Visit,
    compare,
    order,
    verdict,
)


def visits(blocks: int, seconds: object) -> list[Visit]:
    """All visits in order; `seconds` is a function of (arm, number of the visit)."""
    assert callable(seconds)
    found, number = [], 0
    for block in range(blocks):
        for arm in order(block):
            found.append(Visit(block, arm, seconds(arm, number)))
            number += 1
    return found


def result(blocks: int, seconds: object, tolerance: float | None = 0.01) -> Comparison:
    return compare("a case", "stock", "ours", visits(blocks, seconds), tolerance)


def test_blocks_alternate_so_that_no_engine_is_always_first() -> None:
    assert order(0) == (A, B, B, A) and order(1) == (B, A, A, B) and order(2) == order(0)


def test_equal_engines_on_a_drifting_machine_are_equal() -> None:
    # Each visit is 3 % slower than the one before, exponentially: its logarithm is linear in time.
    found = result(3, lambda arm, number: 2.0 * 1.03**number)
    assert found.ratio == pytest.approx(1.0, abs=1e-12) and found.verdict == MET


def test_the_ratio_is_b_s_speed_over_a_s_and_holds_every_visit() -> None:
    found = result(2, lambda arm, number: 3.0 if arm == A else 4.0)
    assert found.ratio == pytest.approx(0.75) and found.verdict == MISSED and found.blocks == 2
    assert found.orders == ("abba", "baab") and found.seconds == ((3.0, 4.0, 4.0, 3.0), (4.0, 3.0, 3.0, 4.0))


def test_the_reach_is_students_for_few_blocks() -> None:
    # t of 0.975 with 2 degrees of freedom: 4.303 (any table); s = 1, n = 3.
    assert mean_reach([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert mean_reach([1.0]) == math.inf


def test_one_block_bounds_nothing() -> None:
    found = result(1, lambda arm, number: 1.0)
    assert (found.low, found.high, found.verdict) == (0.0, math.inf, OPEN)


@pytest.mark.parametrize(
    ("low", "high", "tolerance", "expected"),
    [
        (0.995, 1.02, 0.01, MET),
        (0.99, 0.99, 0.01, MET),
        (0.98, 1.02, 0.01, OPEN),
        (0.97, 0.989, 0.01, MISSED),
        (0.5, 0.6, None, UNJUDGED),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, tolerance: float | None, expected: str) -> None:
    assert verdict(low, high, tolerance) == expected


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random_numbers = random.Random(7)
    hits, runs = 0, 400
    for _ in range(runs):
        found = result(5, lambda arm, number: (1.0 if arm == A else 1.02) * math.exp(random_numbers.gauss(0, 0.02)))
        hits += found.low <= 1 / 1.02 <= found.high
    # 95 % of 400 runs; four standard deviations (√(400 · 0.95 · 0.05) = 4.4) to either side.
    assert 362 <= hits <= 398


def test_an_unfinished_block_does_not_count_and_none_is_an_error() -> None:
    found = [*visits(2, lambda arm, number: 1.0), Visit(2, A, 9.0)]
    assert compare("c", "x", "y", found, None).blocks == 2
    for bad in ([Visit(0, A, 1.0)], visits(1, lambda arm, number: 0.0)):
        with pytest.raises(ValueError, match="whole blocks"):
            compare("c", "x", "y", bad, None)
