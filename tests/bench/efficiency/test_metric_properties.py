"""What must hold of every run, by generated ones: nobody gains by answering later, less, or not at all."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hand_made import NO_ANSWER, lasting, unhurried, window
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.bench.efficiency.attribution import window_seconds
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.metrics import compute, summarise
from vllm_puzzle.bench.efficiency.percentile import percentile
from vllm_puzzle.bench.efficiency.record import CORRECT, OUTCOMES, TIMEOUT, TRUNCATED, WRONG, RequestRecord
from vllm_puzzle.bench.efficiency.slo import Slo

FACTS = window(0.0, 16.0, num_gpus=2, slo=Slo(ttfat=3.0, e2e=6.0))
LATENCIES = [f"{name}_{part}" for name in ("ttft", "ttfat", "e2e") for part in ("mean", "p50", "p90", "p99", "max")]
GOODNESS = ("accuracy", "completion", "slo_attainment", "correct_throughput", "goodput", "correct_goodput")
COSTS = ("gpu_s_per_correct", "tokens_per_correct")

# Times in sixteenths of a second are exact.
sixteenths = st.integers(1, 200).map(lambda ticks: ticks / 16)
records = st.builds(
    lambda sent, duration, outcome, tokens, place: lasting(
        sent, duration, outcome=outcome, output_tokens=tokens, question=f"q{place}"
    ),
    sixteenths,
    sixteenths,
    st.sampled_from(OUTCOMES),
    st.integers(1, 500),
    st.integers(0, 20),
)
runs = st.lists(records, min_size=1, max_size=12)
places = st.integers(0, 11)


def with_one(run: list[RequestRecord], place: int, changed: RequestRecord) -> list[RequestRecord]:
    at = place % len(run)
    return [*run[:at], changed, *run[at + 1 :]]


def at_most(low: float | None, high: float | None) -> bool:
    assert low is not None and high is not None
    return low <= high * (1 + 1e-12)


@unhurried
@given(runs, places, sixteenths)
def test_a_later_reply_improves_no_latency(run: list[RequestRecord], place: int, delay: float) -> None:
    one = run[place % len(run)]
    names = ("first", "first_answer", "last_answer", "last", "done")
    late = with_one(run, place, replace(one, **{name: getattr(one, name) + delay for name in names}))
    before, after = summarise(run, FACTS), summarise(late, FACTS)
    assert all(at_most(before[name], after[name]) for name in LATENCIES)
    assert at_most(after["slo_attainment"], before["slo_attainment"])


@unhurried
@given(runs, places, st.sampled_from([outcome for outcome in OUTCOMES if outcome != CORRECT]))
def test_a_right_answer_less_improves_nothing(run: list[RequestRecord], place: int, outcome: str) -> None:
    right = with_one(run, place, replace(run[place % len(run)], outcome=CORRECT))
    spoilt = with_one(run, place, replace(run[place % len(run)], outcome=outcome))
    before, after = summarise(right, FACTS), summarise(spoilt, FACTS)
    assert all(at_most(after[name], before[name]) for name in GOODNESS)
    assert all(at_most(before[name], after[name]) for name in COSTS)
    assert all(at_most(before[name], after[name]) for name in LATENCIES)


@unhurried
@given(runs, places, st.sampled_from([TRUNCATED, TIMEOUT]))
def test_giving_up_before_the_answer_improves_no_wait_for_it(
    run: list[RequestRecord], place: int, outcome: str
) -> None:
    silent = with_one(run, place, replace(run[place % len(run)], outcome=outcome, **NO_ANSWER))
    before, after = summarise(run, FACTS), summarise(silent, FACTS)
    assert all(at_most(before[name], after[name]) for name in LATENCIES if name.startswith("ttfat"))
    assert after["ttfat_max"] == math.inf
    assert all(at_most(after[name], before[name]) for name in GOODNESS)


@unhurried
@given(runs, st.integers(1, 4))
def test_a_request_more_that_fails_improves_nothing_but_the_count(run: list[RequestRecord], failures: int) -> None:
    failed = [lasting(0.5, 1.0, outcome=WRONG, question=f"more{place}") for place in range(failures)]
    for name in ("accuracy", "correct_throughput", "correct_goodput"):
        assert at_most(compute(name, [*run, *failed], FACTS), compute(name, run, FACTS))
    for name in COSTS:
        assert at_most(compute(name, run, FACTS), compute(name, [*run, *failed], FACTS))


@unhurried
@given(runs)
def test_the_outcomes_add_up_and_accuracy_is_completion_times_accuracy_given_it(run: list[RequestRecord]) -> None:
    found = summarise(run, FACTS)
    assert sum(found[f"outcome_{outcome}"] or 0.0 for outcome in OUTCOMES) == pytest.approx(1)
    assert found["accuracy"] == pytest.approx(
        (found["completion"] or 0.0) * (found["accuracy_given_completion"] or 0.0)
    )
    assert at_most(found["correct_goodput"], found["goodput"])
    assert at_most(found["goodput"], found["request_throughput"])


@unhurried
@given(runs, st.integers(1, 8))
def test_the_order_of_records_and_twice_the_devices_change_what_they_must(run: list[RequestRecord], seed: int) -> None:
    shuffled = [run[place] for place in np.random.default_rng(seed).permutation(len(run))]
    assert summarise(shuffled, FACTS) == summarise(run, FACTS)
    double = summarise(run, replace(FACTS, num_gpus=4))
    for name in ("gpu_s_per_request", "gpu_s_per_correct"):
        assert double[name] == 2 * (compute(name, run, FACTS) or 0.0)


@unhurried
@given(st.lists(st.integers(0, 50).map(float), min_size=1, max_size=40), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)


@unhurried
@given(runs, st.integers(0, 6), st.integers(1, 12))
def test_the_machine_is_shared_out_without_a_rest(run: list[RequestRecord], start: int, length: int) -> None:
    facts = window(float(start), float(start + length))
    seconds = window_seconds(run, facts)
    busy = any(record.sent < start + length and record.done > start for record in run)
    assert seconds.sum() == pytest.approx(length if busy else 0.0)
    assert np.all(seconds >= 0)


def test_two_requests_at_once_pay_half_each_and_idle_time_is_paid_by_all() -> None:
    run = [lasting(0.0, 4.0), lasting(2.0, 4.0), lasting(8.0, 2.0), lasting(0.0, 4.0, block=1)]
    facts = RunFacts((Window(0.0, 10.0), Window(0.0, 2.0, 1)))
    # Alone 0–2 and 4–6, two at 2–4, one 8–10: 3, 3 and 2 of eight busy seconds, and ten to pay.
    assert window_seconds(run, facts).tolist() == [3.75, 3.75, 2.5, 2.0]
    assert window_seconds([], facts).tolist() == []
