"""Metrics of one request against their closed form, to the tick."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hand_made import NO_ANSWER, NOTHING, made
from vllm_puzzle.bench.efficiency.metrics_request import REQUEST_METRICS, cut_by_budget, meets
from vllm_puzzle.bench.efficiency.slo import Slo

NEVER = math.inf
# Sent at 1 in a closed loop; see hand_made.ANSWERED.
ANSWERED = {
    "ttft": 0.5,
    "ttfat": 3.0,
    "queue_delay": None,
    "thinking_time": 2.5,
    "answer_time": 1.0,
    "e2e": 4.0,
    "tpot_thinking": 2.0 / 16,
    "tpot_answer": 1.0 / 8,
    "tpot": 3.5 / 28,
    "prompt_tokens": 64,
    "thinking_tokens": 17,
    "answer_tokens": 9,
    "output_tokens": 29,
    "thinking_share": 17 / 29,
}
LATE = {"ttft": 1.25, "ttfat": 3.75, "queue_delay": 0.75, "e2e": 4.75}
CUT_OFF = {
    "ttfat": NEVER,
    "thinking_time": NEVER,
    "answer_time": None,
    "e2e": 2.5,
    "tpot_answer": None,
    "tpot": 2.0 / 28,
    "answer_tokens": 0,
}
FAILED = dict.fromkeys(ANSWERED) | {"ttft": NEVER, "ttfat": NEVER, "e2e": NEVER}
OFF = {
    "ttft": 3.0,
    "thinking_time": None,
    "tpot_thinking": None,
    "tpot": 1.0 / 28,
    "thinking_tokens": 0,
    "thinking_share": 0.0,
}
WITHOUT_THOUGHT = {"first": 4.0, "first_thinking": None, "last_thinking": None, "first_thinking_tokens": None}
CASES: dict[str, tuple[dict[str, Any], dict[str, float | None]]] = {
    "answered": ({}, {}),
    "sent late in an open loop": ({"scheduled": 0.25}, LATE),
    "cut off while thinking": (NO_ANSWER | {"outcome": "truncated", "last": 3.5}, CUT_OFF),
    "refused": (NOTHING | {"outcome": "error"}, FAILED),
    "broken off within the answer": ({"outcome": "error"}, {"e2e": NEVER}),
    "timed out within the answer": ({"outcome": "timeout"}, {"e2e": NEVER}),
    "without a thought": (WITHOUT_THOUGHT | {"thinking_tokens": 0}, OFF),
    "four tokens in the first chunks": (
        {"first_thinking_tokens": 5, "first_answer_tokens": 5},
        {"tpot_thinking": 2.0 / 12, "tpot_answer": 1.0 / 4, "tpot": 3.5 / 24},
    ),
    "answer in one chunk": (
        {"first_answer": 5.0, "first_answer_tokens": 9},
        {"ttfat": 4.0, "thinking_time": 3.5, "answer_time": 0.0, "tpot_answer": None},
    ),
    "a count in every chunk": ({"span_tokens": 27}, {"tpot": 3.5 / 27}),
    "all tokens in one chunk": ({"span_tokens": 0}, {"tpot": None}),
    "counts that the tokenizer contradicts": ({"span_tokens": 27, "token_source": "client"}, {}),
    "tokens of the first chunks unknown": (
        {"first_thinking_tokens": None, "first_answer_tokens": None},
        {"tpot_thinking": None, "tpot_answer": None, "tpot": None},
    ),
    "no counts at all": (
        {"prompt_tokens": None, "thinking_tokens": None, "answer_tokens": None, "output_tokens": None},
        dict.fromkeys(
            ["tpot_thinking", "tpot_answer", "tpot", "prompt_tokens", "thinking_tokens", "answer_tokens",
             "output_tokens", "thinking_share"]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric", REQUEST_METRICS, ids=lambda metric: metric.name)
def test_a_metric_equals_its_closed_form(case: str, metric: Any) -> None:
    changes, expected = CASES[case]
    assert metric.compute(made(**changes)) == (ANSWERED | expected)[metric.name]


def test_every_metric_has_a_closed_form_a_formula_and_a_unit() -> None:
    assert [metric.name for metric in REQUEST_METRICS] == list(ANSWERED)
    assert all(metric.formula and metric.unit for metric in REQUEST_METRICS)


@pytest.mark.parametrize(
    ("limits", "changes", "expected"),
    [
        ({"ttft": 0.5, "ttfat": 3.0, "tpot": 0.125, "e2e": 4.0}, {}, True),  # limits are inclusive
        ({"ttft": 0.4375}, {}, False),
        ({"ttfat": 2.9375}, {}, False),
        ({"tpot": 0.0625}, {}, False),
        ({"e2e": 3.9375}, {}, False),
        ({"ttft": 1.0}, {"scheduled": 0.0}, False),  # the wait in the client counts
        ({"ttft": 1.0, "tpot": 1.0}, {"answer_tokens": None}, None),
        ({"ttft": 0.25, "tpot": 1.0}, {"answer_tokens": None}, False),  # broken, whatever is unknown
        ({"tpot": 0.001}, {"first_answer": 5.0, "first_answer_tokens": 9}, True),  # one chunk has no gap
        ({"ttfat": 1e9}, NO_ANSWER, False),
    ],
)
def test_a_request_meets_all_limits_or_none(
    limits: dict[str, float], changes: dict[str, Any], expected: bool | None
) -> None:
    assert meets(made(**changes), Slo(**limits)) is expected


def test_a_cut_is_known_only_with_a_budget_and_a_server_that_tells() -> None:
    assert cut_by_budget(made(budget=16, end_reason="budget")) is True
    assert cut_by_budget(made(budget=16, end_reason="natural")) is False
    assert cut_by_budget(made(budget=16, end_reason=None)) is None
    assert cut_by_budget(made(budget=None, end_reason="natural")) is None
