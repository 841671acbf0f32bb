"""Whole runs against the mock in virtual time: every metric equals what the script of the replies makes it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from virtual_runs import TICK, Finished, arm_of, finished, question, steps
from vllm_puzzle.bench.efficiency.arm import CLOSED, CONSTANT, GAMMA, POISSON, TRACE, Load
from vllm_puzzle.bench.efficiency.load import arrivals
from vllm_puzzle.bench.efficiency.metrics import METRICS
from vllm_puzzle.bench.efficiency.mock_behaviour import ANSWER, DROP, FINISH, ROLE, THINKING, TOOL, Behaviour, Step
from vllm_puzzle.bench.efficiency.percentile import PERCENTS
from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import (
    CORRECT,
    DRAIN,
    EMPTY,
    ERROR,
    LOOP,
    NO_PARSE,
    RAMP,
    STEADY,
    TIMEOUT,
    TRUNCATED,
    WARM_UP,
    WRONG,
)
from vllm_puzzle.bench.efficiency.run import Setup
from vllm_puzzle.bench.efficiency.slo import Slo
from vllm_puzzle.bench.efficiency.summary import Deployment

INF = math.inf
ONE = Load(CLOSED, concurrency=1)
TIMEOUT_TICKS = 256

# name → (script, how it ends, ticks from sending to: first text, first answer, last text, end). See `steps`.
CASES: dict[str, tuple[list[Step], dict[str, Any], str, tuple[float, float, float, float]]] = {
    # Thinking tokens at 10, 12 … 40, the marker at 41, the answer at 42 and 43, the end token at 44.
    "right": (steps(16), {"end_reason": "natural"}, CORRECT, (10, 42, 43, 44)),
    # No thought: the answer at 9 and 10.
    "wrong": (steps(0, "no"), {"end_reason": "off"}, WRONG, (9, 9, 10, 11)),
    # Thinking at 10 … 24, the marker at 25, the end at 26.
    "silent": (steps(8, ""), {"end_reason": "budget"}, EMPTY, (10, INF, 24, 26)),
    # Thinking at 10 … 16, then max_tokens.
    "cut": ([*steps(4)[:5], Step(0.0, FINISH, "length")], {"end_reason": "length"}, TRUNCATED, (10, INF, 16, 16)),
    "mumbled": (steps(4, "hmm"), {"end_reason": "budget"}, NO_PARSE, (10, 18, 20, 21)),
    "round": (steps(4, "hmm"), {"end_reason": "loop"}, LOOP, (10, 18, 20, 21)),
    # Two thinking tokens at 10 and 12, then the connection breaks.
    "broken": ([*steps(2)[:3], Step(0.0, DROP)], {}, ERROR, (10, INF, INF, 12)),
    "refused": ([], {"status": 429}, ERROR, (INF, INF, INF, 0)),
    # One thinking token at 10, the next far beyond the client's patience.
    "slow": ([*steps(1)[:2], Step(1000.0, ANSWER, "ok", 2)], {}, TIMEOUT, (10, INF, INF, TIMEOUT_TICKS)),
}
# name → (N_t, N_a, N_o), with the end token among the answer's; None where the reply broke off before any count.
TOKENS: dict[str, tuple[int | None, int | None, int | None]] = {
    "right": (16, 3, 20),
    "wrong": (0, 3, 3),
    "silent": (8, 1, 10),
    "cut": (4, 0, 4),
    "mumbled": (4, 4, 9),
    "round": (4, 4, 9),
    "broken": (2, 0, 2),
    "refused": (None, None, None),
    "slow": (1, 0, 1),
}
BUDGET = 12


def rank(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return next(
        value for value in sorted(values) if sum(other <= value for other in values) * 100 >= percent * len(values)
    )


def aggregates(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"{name}_{part}": None for part in ("mean", "max", *(f"p{percent}" for percent in PERCENTS))}
    found = {f"{name}_mean": math.fsum(values) / len(values), f"{name}_max": max(values)}
    return found | {f"{name}_p{percent}": rank(values, percent) for percent in PERCENTS}


def one_of_each() -> Finished:
    questions = [question(name, script, **reply) for name, (script, reply, _, _) in CASES.items()]
    arm = arm_of(budget=BUDGET, timeout_s=TIMEOUT_TICKS * TICK)
    slo = Slo(ttfat=42 * TICK, e2e=20 * TICK)
    deployment = Deployment(num_gpus=2, price_per_device_hour=3.6, slo=slo)
    return finished(questions, ONE, arm=arm, setup=Setup(deployment=deployment))


def expected_of_one_each() -> dict[str, float | None]:
    """Every metric by hand. In ticks where it is a time of one request, turned into seconds at the end."""
    ends = {name: case[3] for name, case in CASES.items()}
    total = sum(end for *_, end in ends.values()) * TICK
    count, output = len(CASES), sum(tokens or 0 for *_, tokens in TOKENS.values())
    times = {
        "ttft": [first for first, *_ in ends.values()],
        "ttfat": [answer for _, answer, *_ in ends.values()],
        "e2e": [INF if math.isinf(last) else last for *_, last, _ in ends.values()],
        "queue_delay": [],
        # Of those with a thought: 42-10, three times none, 18-10 twice, and two that broke off.
        "thinking_time": [32, INF, INF, 8, 8, INF, INF],
        # Of those with an answer.
        "answer_time": [1, 1, 2, 2],
        # Thinking tokens are 2 ticks apart, answers 1; a single token has no distance.
        "tpot_thinking": [2] * 6,
        "tpot_answer": [1] * 4,
        # To the last text, over the tokens after the first chunk: the marker is among them, the end token is not.
        "tpot": [33 / 18, 1, 14 / 7, 2, 10 / 7, 10 / 7, 2],
    }
    found: dict[str, float | None] = {}
    for name, ticks in times.items():
        found |= aggregates(name, [value * TICK for value in ticks])
    thinking, answer, whole = zip(*TOKENS.values(), strict=True)
    shares = [n_t / n_o for n_t, _, n_o in TOKENS.values() if n_t is not None and n_o]
    for name, values in (("thinking_tokens", thinking), ("answer_tokens", answer), ("output_tokens", whole)):
        found |= aggregates(name, [value for value in values if value is not None])
    found |= aggregates("prompt_tokens", [16] * 8) | aggregates("thinking_share", shares)
    found |= {
        f"outcome_{case[2]}": sum(other[2] == case[2] for other in CASES.values()) / count for case in CASES.values()
    }
    excesses = [n_t - BUDGET for n_t in thinking if n_t is not None]
    # Whole answers: right, wrong, mumbled. Within 42 ticks to the answer and 20 in all: wrong and mumbled.
    found |= {
        "issued": count, "accuracy": 1 / count, "completion": 3 / count, "accuracy_given_completion": 1 / 3,
        "budget_over": 1 / len(excesses), "budget_excess_max": 4, "budget_excess_p99": 4,
        # The server gave a reason for six; the budget was it twice, and neither was right.
        "budget_cut": 2 / 6, "budget_cut_correct": 0.0,
        "tokens_known": 1.0, "cache_hit_share": 0.0, "slo_attainment": 2 / count, "drained": 0.0, "drain_time": 0.0,
        "duration": total, "request_throughput": 3 / total, "request_throughput_per_gpu": 3 / total / 2,
        "correct_throughput": 1 / total, "goodput": 2 / total, "correct_goodput": 0.0,
        "output_throughput": output / total, "tokens_per_request": output / 8,
        "request_rate_quotient": output / total / (output / 8), "tokens_per_correct": output,
        "gpu_s_per_request": 2 * total / 3, "gpu_s_per_correct": 2 * total,
        # 3.6 $ per GPU-hour are 0.001 $ per GPU-second, 1 $ per thousand.
        "usd_per_1k_correct": 2 * total,
    }  # fmt: skip
    return found


# Without an energy counter, or a number of cores.
NOT_TOLD = {metric.name for metric in METRICS if metric.name.startswith(("joules", "core_s"))}


def test_every_metric_of_a_run_equals_its_closed_form() -> None:
    found = one_of_each().metrics
    expected = expected_of_one_each()
    assert set(expected) == set(found) - NOT_TOLD, "a metric without a closed form here"
    for name, value in expected.items():
        seen = INF if found[name] == "inf" else found[name]
        # Times are exact sums of ticks; quotients of them round once or twice.
        assert seen == (None if value is None else pytest.approx(value, rel=1e-14, abs=0.0)), name


def test_every_request_ends_in_its_own_way() -> None:
    run = one_of_each()
    assert {record.question: record.outcome for record in run.records} == {
        name: case[2] for name, case in CASES.items()
    }
    by_name = {record.question: record for record in run.records}
    assert by_name["refused"].error == "HTTP 429: mock: 429"
    assert by_name["broken"].error is not None and "middle of the reply" in by_name["broken"].error
    assert by_name["slow"].error == "no end after 4 s"
    for name, (thinking, answer, output) in TOKENS.items():
        record = by_name[name]
        assert (record.thinking_tokens, record.answer_tokens, record.output_tokens) == (thinking, answer, output), name


def test_all_stamps_of_a_request_are_those_of_its_script() -> None:
    (record,) = finished([question("q", steps(16))], ONE).records
    ticks = {name: getattr(record, name) / TICK for name in (
        "sent", "first", "first_thinking", "first_answer", "last_thinking", "last_answer", "last", "done")}  # fmt: skip
    assert ticks == {
        "sent": 0, "first": 10, "first_thinking": 10, "last_thinking": 40, "first_answer": 42, "last_answer": 43,
        "last": 43, "done": 44,
    }  # fmt: skip
    # 15 thinking tokens, the marker and two of the answer came between the first text and the last.
    assert (record.chunks, record.span_tokens) == (18, 18)


@pytest.mark.parametrize("bundle", [1, 3, 5])
@pytest.mark.parametrize("first_bundle", [1, 7])
def test_time_per_token_does_not_depend_on_how_tokens_are_bundled(bundle: int, first_bundle: int) -> None:
    behaviour = Behaviour(
        prefill=8 * TICK, thinking_tpot=2 * TICK, answer_tpot=TICK, thinking_tokens=(23, 23), answer_tokens=(16, 16),
        bundle=bundle, first_bundle=first_bundle,
    )  # fmt: skip
    metrics = finished([question("7")], ONE, behaviour=behaviour).metrics
    assert metrics["tpot_thinking_mean"] == 2 * TICK
    assert metrics["tpot_answer_mean"] == TICK
    assert metrics["ttft_mean"] == (8 + 2 * first_bundle) * TICK
    assert metrics["thinking_tokens_mean"] == 23


def test_a_server_that_counts_at_the_end_leaves_time_per_token_unknown_but_counts_exact() -> None:
    settings = {"thinking_tokens": (9, 9), "bundle": 2}
    at_end = finished([question("7")], ONE, behaviour=Behaviour(usage="end", **settings)).metrics
    continuous = finished([question("7")], ONE, behaviour=Behaviour(**settings)).metrics
    for name in ("thinking_tokens_mean", "answer_tokens_mean", "output_tokens_mean", "e2e_mean"):
        assert at_end[name] == continuous[name] is not None
    assert at_end["tpot_thinking_mean"] is None
    assert continuous["tpot_thinking_mean"] == pytest.approx(0.005)


def test_a_closed_load_keeps_its_concurrency_at_both_ends_of_the_window() -> None:
    # Replies of 44 ticks, four at a time: a warm-up wave, four waves, and nothing else.
    run = finished(
        [question(f"q{index}", steps(16)) for index in range(16)],
        Load(CLOSED, concurrency=4),
        warm_up=[question(f"w{index}", steps(16)) for index in range(4)],
    )
    assert [value / TICK for value in run.window] == [44, 5 * 44]
    assert run.metrics["request_throughput"] == 4 / (44 * TICK)
    assert [record.phase for record in run.records] == [WARM_UP] * 4 + [STEADY] * 16
    assert run.mock.running == 0


def test_the_drain_is_kept_apart() -> None:
    # Two at a time; the last one takes ten times as long and is alone from 5 waves on.
    scripts = [steps(16)] * 10 + [steps(220)]
    run = finished([question(f"q{index}", script) for index, script in enumerate(scripts)], Load(CLOSED, concurrency=2))
    assert run.window[1] / TICK == 5 * 44
    assert run.metrics["request_throughput"] == 10 / (5 * 44 * TICK)
    assert run.records[-1].phase == DRAIN
    assert run.metrics["drain_time"] == run.records[-1].done - run.window[1]
    assert run.metrics["accuracy"] == 1.0 and run.metrics["issued"] == 11


def test_what_ends_before_the_warm_up_does_counts_for_accuracy_but_not_for_rates() -> None:
    # One warm-up of 224 ticks beside the list: five measured ones (44 ticks each) end before it does.
    run = finished(
        [question(f"q{index}", steps(16)) for index in range(11)],
        Load(CLOSED, concurrency=2),
        warm_up=[question("w", steps(106))],
    )
    assert [record.phase for record in run.records].count(RAMP) == 5
    assert run.metrics["issued"] == 11
    assert run.window[0] / TICK == 224


def test_an_open_load_keeps_its_rate_whatever_the_server_does() -> None:
    # One every 16 ticks, of 44 ticks each: the last goes out at 30·16, and its like are in flight then.
    run = finished([question(f"q{index}", steps(16)) for index in range(31)], Load(CONSTANT, rate=1 / (16 * TICK)))
    assert [record.sent / TICK for record in sorted(run.records, key=lambda record: record.order)] == [
        16 * index for index in range(31)
    ]
    assert run.window == (0.0, 480 * TICK)
    # Those sent by 436 have ended by 480.
    assert run.metrics["request_throughput"] == 28 / (480 * TICK)
    assert run.metrics["queue_delay_max"] == 0.0
    assert run.metrics["drain_time"] == 44 * TICK


@pytest.mark.parametrize("limit", [None, 1])
def test_a_queue_counts_from_the_intended_time_wherever_it_stands(limit: int | None) -> None:
    # A server of one slot, or a client that sends one at a time: 44 ticks each, one every 16.
    run = finished(
        [question(f"q{index}", steps(16)) for index in range(9)],
        Load(CONSTANT, concurrency=limit, rate=1 / (16 * TICK)),
        behaviour=Behaviour(slots=1),
    )
    waits = [(record.done - record.start) / TICK for record in sorted(run.records, key=lambda record: record.order)]
    assert waits == [44 + (44 - 16) * index for index in range(9)]
    assert run.metrics["queue_delay_max"] == (0.0 if limit is None else (44 - 16) * 8 * TICK)


def test_a_trace_is_replayed_at_its_times() -> None:
    times = (5.0, 5.25, 7.0)
    run = finished([question(f"q{index}", steps(0)) for index in range(3)], Load(TRACE, times=times))
    assert [record.scheduled for record in run.records] == [0.0, 0.25, 2.0]


def test_a_growing_queue_is_called_a_drift_and_a_steady_one_is_not() -> None:
    questions = [question(f"q{index}", steps(16)) for index in range(60)]
    load = Load(CONSTANT, rate=1 / (16 * TICK))
    steady = finished(questions, load, warm_up=questions[:5]).summary["stationarity"]
    drifting = finished(questions, load, behaviour=Behaviour(slots=1)).summary["stationarity"]
    assert steady["label"] == "stationary"
    assert drifting["label"] == "drifting"
    assert drifting["in_flight"]["change"] > 1 and drifting["latency"]["change"] > 1
    assert finished(questions[:9], load).summary["stationarity"]["label"] == "too short to tell"


def test_the_same_seed_makes_the_same_run_and_another_does_not() -> None:
    load = Load(GAMMA, rate=8.0, burstiness=0.5)
    questions = [question(str(index)) for index in range(20)]
    runs = [finished(questions, load, setup=Setup(seed=seed)).records for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("load", "variation"),
    [(Load(POISSON, rate=50.0), 1.0), (Load(GAMMA, rate=50.0, burstiness=0.25), 2.0), (Load(CONSTANT, rate=50.0), 0.0)],
)
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(load: Load, variation: float) -> None:
    count = 20_000
    times = arrivals(load, count, seed=5)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = math.fsum(gaps) / len(gaps)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    # A gamma of shape k has the coefficient of variation 1/√k. Five standard errors of the mean: 5·cv/√n; of the cv of
    # a gamma of this size a few per cent.
    assert mean == pytest.approx(1 / 50, rel=max(5 * variation / math.sqrt(count), 1e-9))
    assert deviation / mean == pytest.approx(variation, abs=0.1 * variation + 1e-9)
    assert times[0] == 0.0 and times == sorted(times) and arrivals(load, count, seed=5) == times


@pytest.mark.parametrize("ramp", ["linear", "exponential"])
def test_a_ramp_goes_from_one_rate_to_the_other(ramp: str) -> None:
    times = arrivals(Load(CONSTANT, ramp=ramp, rate_start=2.0, rate_end=8.0), 101, seed=0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    middle = {"linear": 5.0, "exponential": 4.0}[ramp]
    # The gap before a request is the inverse of its rate.
    assert (1 / gaps[-1], 1 / gaps[49]) == (pytest.approx(8.0), pytest.approx(middle))
    assert gaps == sorted(gaps, reverse=True)


def test_the_shares_set_at_the_mock_are_those_measured() -> None:
    behaviour = Behaviour(wrong=0.3, no_parse=0.1, empty=0.1, refused=0.1, drop=0.1, thinking_tokens=(1, 2))
    count = 600
    questions = [question(str(index)) for index in range(count)]
    graded = [Question(q.task, q.id, q.messages, _grader(q.id)) for q in questions]
    metrics = finished(graded, Load(CLOSED, concurrency=50), behaviour=behaviour).metrics
    # Independent draws, in the order in which the mock looks at them; five standard errors.
    alive = 0.9 * 0.9
    shares = {
        ERROR: 1 - alive, EMPTY: alive * 0.1, NO_PARSE: alive * 0.9 * 0.1, WRONG: alive * 0.81 * 0.3,
        CORRECT: alive * 0.81 * 0.7,
    }  # fmt: skip
    for outcome, share in shares.items():
        error = 5 * math.sqrt(share * (1 - share) / count)
        assert metrics[f"outcome_{outcome}"] == pytest.approx(share, abs=error), outcome


def _grader(right: str) -> Any:
    return lambda answer: CORRECT if answer.strip() == right else WRONG if answer.strip().isdigit() else NO_PARSE


def test_a_tool_call_is_an_answer_of_its_own_kind() -> None:
    script = [
        Step(8 * TICK, ROLE),
        Step(TICK, THINKING, "t", 1),
        Step(TICK, TOOL, '{"a":', 3),
        Step(TICK, TOOL, "1}", 2),
    ]
    (record,) = finished([question("q", [*script, Step(TICK, FINISH, "tool_calls", 1)])], ONE).records
    assert (record.first_answer, record.last_answer) == (10 * TICK, 11 * TICK)
    assert (record.answer_tokens, record.first_answer_tokens, record.outcome) == (6, 4, EMPTY)


def test_a_run_leaves_its_manifest_records_and_both_summaries(tmp_path: Path) -> None:
    setup = Setup(config={"margin": 0.01}, metadata={"who": "me"})
    run = finished([question("q", steps(3))], ONE, folder=tmp_path / "deep" / "run", setup=setup)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "manifest.json", "requests.jsonl", "summary.csv", "summary.json"]  # fmt: skip
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["arm"], manifest["config"]) == ("complete", "arm", {"margin": 0.01})
    assert json.loads((run.folder / "summary.json").read_text()) == json.loads(json.dumps(run.summary))
    rows = (run.folder / "summary.csv").read_text().splitlines()
    assert rows[0] == "metric,value,unit,formula" and len(rows) == len(METRICS) + 1
