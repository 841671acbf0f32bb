"""Metrics of a run against their closed form: seven requests, one window of eight seconds."""

from __future__ import annotations

import json
import math

import pytest
from hand_made import NO_ANSWER, NOTHING, lasting, made, window
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.metrics import (
    BY_NAME,
    DISTRIBUTIONS,
    METRICS,
    as_json,
    compute,
    from_json,
    summarise,
    summarise_by,
    values_of,
)
from vllm_puzzle.bench.efficiency.metrics_rate import relative_rate
from vllm_puzzle.bench.efficiency.metrics_request import REQUEST_METRICS
from vllm_puzzle.bench.efficiency.percentile import AGGREGATES, percentile
from vllm_puzzle.bench.efficiency.record import DRAIN, WARM_UP
from vllm_puzzle.bench.efficiency.slo import Slo
from vllm_puzzle.model_configs.schema import ConfigError

RECORDS = [
    made(question="warm", phase=WARM_UP, outcome="wrong", done=2.0, output_tokens=8),
    made(question="q0", budget=16, end_reason="budget"),  # right after a cut, one token over its budget
    made(question="q1", budget=32, outcome="wrong", done=6.0, output_tokens=30),
    made(question="q2", outcome="no_parse", first_answer=6.0, last_answer=7.5, last=7.5, done=8.0, output_tokens=32),
    made(question="q3", **(NO_ANSWER | {"outcome": "truncated", "last": 3.5, "done": 3.75, "budget": 17})),
    made(question="q4", **(NOTHING | {"outcome": "error", "done": 1.25})),
    made(question="q5", phase=DRAIN, last=9.0, done=9.5, cached_tokens=0),  # right, but after the window
]
FACTS = RunFacts(
    (Window(0.0, 8.0, energy_j=400.0),),
    num_gpus=2,
    num_cores=4,
    idle_power_w=25.0,
    price_per_device_hour=3.6,
    slo=Slo(ttfat=4.0),
)
# Window (0, 8]: whole answers warm, q0, q1, q2; right q0; tokens 8 + 29 + 30 + 32 + 29.
EXPECTED = {
    "issued": 6,
    "accuracy": 2 / 6,
    "completion": 4 / 6,
    "accuracy_given_completion": 2 / 4,
    "outcome_correct": 2 / 6,
    "outcome_wrong": 1 / 6,
    "outcome_no_parse": 1 / 6,
    "outcome_empty_answer": 0.0,
    "outcome_truncated": 1 / 6,
    "outcome_loop": 0.0,
    "outcome_error": 1 / 6,
    "outcome_timeout": 0.0,
    "budget_over": 1 / 3,
    "budget_excess_max": 1,
    "budget_excess_p99": 1,
    "budget_cut": 1 / 3,
    "budget_cut_correct": 1.0,
    "tokens_known": 1.0,
    "cache_hit_share": 64 / 320,
    "slo_attainment": 3 / 6,  # q0, q1 and q5; q2 answers after 5 s
    "drained": 1 / 6,
    "drain_time": 1.5,
    "duration": 8.0,
    "request_throughput": 4 / 8,
    "request_throughput_per_gpu": 4 / 16,
    "correct_throughput": 1 / 8,
    "goodput": 3 / 8,
    "correct_goodput": 1 / 8,
    "output_throughput": 128 / 8,
    "tokens_per_request": 149 / 5,
    "request_rate_quotient": 16 / (149 / 5),
    "tokens_per_correct": 149 / 2,
    "gpu_s_per_request": 16 / 4,
    "gpu_s_per_correct": 16 / 1,
    "core_s_per_request": 32 / 4,
    "core_s_per_correct": 32 / 1,
    "joules_per_request": 100.0,
    "joules_per_correct": 400.0,
    "joules_above_idle_per_request": 50.0,
    "joules_above_idle_per_correct": 200.0,
    "usd_per_1k_correct": 16.0 * 3.6 / 3.6,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_of_the_run_equals_its_closed_form(name: str) -> None:
    # Only the order of a division may differ.
    assert compute(name, RECORDS, FACTS) == pytest.approx(EXPECTED[name], rel=1e-15, abs=0)


def test_every_metric_of_a_run_has_a_closed_form_here() -> None:
    distributions = {f"{metric.name}_{aggregate}" for metric in REQUEST_METRICS for aggregate in AGGREGATES}
    assert set(BY_NAME) == set(EXPECTED) | distributions
    assert len(BY_NAME) == len(METRICS), "two metrics have one name"
    assert all(metric.formula and metric.unit for metric in METRICS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ttft", [0.5, 0.5, 0.5, 0.5, math.inf, 0.5]),
        ("ttfat", [3.0, 3.0, 5.0, math.inf, math.inf, 3.0]),
        ("e2e", [4.0, 4.0, 6.5, 2.5, math.inf, 8.0]),
        ("answer_time", [1.0, 1.0, 1.5, 5.0]),
        ("output_tokens", [29, 30, 32, 29, 29]),
        ("answer_tokens", [9, 9, 9, 0, 9]),
    ],
)
def test_the_warm_up_is_not_measured_and_the_drain_is(name: str, values: list[float]) -> None:
    (metric,) = [metric for metric in REQUEST_METRICS if metric.name == name]
    assert values_of(metric, RECORDS) == values
    for aggregate, function in AGGREGATES.items():
        assert compute(f"{name}_{aggregate}", RECORDS, FACTS) == function(values)


def test_aggregates_of_ten_values_are_the_ones_that_nearest_rank_picks() -> None:
    values = [float(value) for value in (7, 3, 9, 1, 10, 4, 2, 8, 6, 5)]
    found = {name: function(values) for name, function in AGGREGATES.items()}
    assert found == {"mean": 5.5, "p50": 5.0, "p90": 9.0, "p95": 10.0, "p99": 10.0, "max": 10.0}
    assert {function([]) for function in AGGREGATES.values()} == {None}


def test_a_percentile_counts_ranks_without_rounding_errors() -> None:
    values = [float(value) for value in range(1, 101)]
    # 0.07 · 100, 0.29 · 100, 0.55 · 100 and more are above their whole number in doubles.
    assert [percentile(values, percent) for percent in range(1, 101)] == values
    assert percentile(values, 99.9) == 100.0
    for wrong in (0, -1, 100.5):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, wrong)


def test_percentiles_of_a_wait_are_finite_up_to_the_share_that_was_answered() -> None:
    waits = [1.0] * 90 + [math.inf] * 10
    assert (percentile(waits, 90), percentile(waits, 91)) == (1.0, math.inf)


def test_costs_without_their_reading_are_unknown_and_costs_per_nothing_infinite() -> None:
    bare = summarise(RECORDS, window())
    unknown = [name for name in EXPECTED if bare[name] is None]
    costs = ("gpu", "core", "joules", "usd", "request_throughput_per_gpu", "goodput", "correct_goodput", "slo")
    assert unknown == [name for name in EXPECTED if name.startswith(costs)]
    wrong = [made(outcome="wrong", question=f"q{place}") for place in range(3)]
    assert compute("gpu_s_per_correct", wrong, FACTS) == math.inf
    assert compute("tokens_per_correct", wrong, FACTS) == math.inf


def test_a_sum_of_tokens_is_unknown_when_one_of_them_is() -> None:
    records = [*RECORDS, made(question="q6", output_tokens=None)]
    found = summarise(records, FACTS)
    assert found["tokens_known"] == 5 / 6
    names = ("output_throughput", "tokens_per_request", "request_rate_quotient", "tokens_per_correct")
    assert {found[name] for name in names} == {None}


def test_goodput_is_unknown_where_a_limit_cannot_be_checked() -> None:
    facts = window(slo=Slo(tpot=1.0))
    assert compute("goodput", [made()], facts) == 1 / 8
    assert compute("goodput", [made(), made(first_answer_tokens=None)], facts) is None
    assert compute("goodput", [made(), made(first_answer_tokens=None, outcome="truncated")], facts) == 1 / 8


def test_each_task_may_have_limits_of_its_own() -> None:
    facts = window(slo=Slo(ttfat=2.0), slo_by_task={"proofs": Slo(ttfat=4.0)})
    assert compute("slo_attainment", [made(), made(task="proofs")], facts) == 0.5


def test_rates_of_several_blocks_take_each_request_by_its_own_window() -> None:
    facts = RunFacts((Window(0.0, 6.0, 0, 10.0), Window(100.0, 104.0, 1, 30.0)), num_gpus=1)
    records = [made(done=5.0), made(done=6.5), made(block=1, done=5.0), made(block=1, done=102.0), made(block=2)]
    assert compute("request_throughput", records, facts) == 2 / 10
    assert compute("joules_per_request", records, facts) == 20.0
    assert compute("drain_time", records, facts) == 0.5


def test_without_warm_up_and_drain_accuracy_over_cost_is_right_answers_per_device_second() -> None:
    records = [record for record in RECORDS if record.phase == "steady"]
    found = summarise(records, FACTS)
    given, cost, per_correct = (
        found[name] for name in ("accuracy_given_completion", "gpu_s_per_request", "gpu_s_per_correct")
    )
    assert given is not None and cost is not None and per_correct is not None
    assert given / cost == pytest.approx(1 / per_correct, rel=1e-15)


def test_the_relative_rate_reproduces_the_published_quotient() -> None:
    # Nemotron-3 Nano against Super (arXiv 2607.04371): 5.84 times the tokens/s and 1.51 times the tokens give a request
    # rate of 3.87. Two hundred tokens a reply and 302; windows such that Θ has the ratio 5.84.
    base = [lasting(0.0, 1.0, output_tokens=200)] * 4
    ours = [lasting(0.0, 1.0, output_tokens=302)] * 4
    seconds = 1208 / (5.84 * 800 / 8)
    found = relative_rate(ours, window(0.0, seconds), base, window())
    assert found.verbosity == pytest.approx(1.51) and found.throughput == pytest.approx(5.84)
    assert found.quotient == pytest.approx(3.87, abs=0.005)  # as printed, to two decimals
    assert found.direct == pytest.approx(found.quotient)  # one length for all: they agree


def test_quotient_and_measurement_differ_where_replies_never_end() -> None:
    base = [lasting(0.0, 1.0, output_tokens=100)] * 4
    half = [lasting(0.0, 1.0, output_tokens=100), lasting(0.0, 1.0, output_tokens=100, outcome="truncated")] * 2
    found = relative_rate(half, window(), base, window())
    assert (found.quotient, found.direct) == (1.0, 0.5)


def test_verbosity_is_given_of_means_and_as_mean_over_tasks() -> None:
    base = [lasting(0, 1, output_tokens=10), lasting(0, 1, output_tokens=1000, task="proofs")]
    ours = [lasting(0, 1, output_tokens=20), lasting(0, 1, output_tokens=1000, task="proofs")]
    found = relative_rate(ours, window(), base, window())
    assert (found.verbosity, found.verbosity_by_task) == (1020 / 1010, 1.5)


def test_the_relative_rate_is_per_device() -> None:
    found = relative_rate(RECORDS, window(num_gpus=2), RECORDS, window(num_gpus=1))
    assert (found.verbosity, found.throughput, found.quotient, found.direct) == (1.0, 0.5, 0.5, 0.5)


def test_a_group_has_the_metrics_of_its_requests() -> None:
    groups = summarise_by([*RECORDS, made(task="proofs")], FACTS, lambda record: record.task)
    assert list(groups) == ["proofs", "sums"]
    assert groups["sums"] == summarise(RECORDS, FACTS)
    assert groups["proofs"]["accuracy"] == 1.0


def test_infinite_values_survive_json_and_are_not_taken_for_unknown() -> None:
    values = summarise(RECORDS, FACTS)
    text = json.dumps(as_json(values), allow_nan=False)
    assert from_json(json.loads(text)) == values
    assert values["ttfat_p99"] == math.inf and values["queue_delay_p50"] is None


def test_the_aggregated_metrics_name_their_formula() -> None:
    assert {metric.formula for metric in DISTRIBUTIONS if metric.name == "ttfat_p90"} == {
        "p90 of tA - start, ∞ without an answer"
    }


def test_facts_survive_json() -> None:
    facts = RunFacts(FACTS.windows, 2, None, 25.0, 3.6, Slo(ttfat=4.0), {"proofs": Slo(e2e=9.0)})
    assert RunFacts.from_object(json.loads(json.dumps(facts.to_object())), "facts") == facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": []}, "windows"),
        ({"windows": [{"start": 2.0, "end": 1.0}]}, "found 2.0 to 1.0, allowed: start < end"),
        ({"windows": [{"start": 0.0, "end": 1.0}, {"start": 2.0, "end": 3.0}]}, r"blocks \[0, 0\]"),
        ({"windows": [{"begin": 0.0, "end": 1.0}]}, "begin"),
        ({"gpus": 1}, "gpus"),
        ({"num_gpus": 0}, "num_gpus"),
        ({"slo": {"ttft": -1.0}}, "`ttft`: found -1.0"),
        ({"slo": {"itl": 1.0}}, "itl"),
        ({"slo": {}}, "no limit"),
    ],
)
def test_facts_that_make_no_sense_are_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunFacts.from_object({"windows": [{"start": 0.0, "end": 1.0}]} | changes, "manifest, key `facts`")
    assert "\n" not in str(caught.value)
