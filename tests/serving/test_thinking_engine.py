"""Budgets on vLLM's real V1 engine: exact token sequences of a scripted model, in every batch that it can be in.

Each case runs in a plain engine, and with speculative decoding and small prefill chunks; a third engine's KV cache is
so small that requests are preempted and computed again.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import thinking_cases
from scripted_model import SHUT, STRENGTH, VOCAB_SIZE, decode
from thinking_cases import ANSWER, CASES, HAPPENINGS, MARKERS, SINGLE
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMachine, ThinkingMarkers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """engine → {"counters": …, (round, name): result}."""
    return thinking_cases.outcomes()


BOTH = pytest.mark.parametrize("engine", ["plain", "drafts and chunks"])


@BOTH
@pytest.mark.parametrize("case", CASES, ids=": ".join)
def test_the_tokens_are_exactly_those(outcomes: dict[str, Any], engine: str, case: tuple[str, str]) -> None:
    (sequence,) = outcomes[engine][case]["sequences"]
    assert decode(sequence["ids"]) == CASES[case][1]


def test_drafts_were_taken_and_refused(outcomes: dict[str, Any]) -> None:
    counters = outcomes["drafts and chunks"]["counters"]
    accepted, drafted = (counters[f"vllm:spec_decode_num_{what}_tokens"] for what in ("accepted", "draft"))
    assert 0.1 * drafted < accepted < 0.9 * drafted


def test_preempted_requests_go_on_where_they_were(outcomes: dict[str, Any]) -> None:
    assert outcomes["preempted"]["counters"]["vllm:num_preemptions"] >= 1
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 3
    for at, result in enumerate(outcomes["preempted"]["rounds"][0]):
        expected = alphabet[:45] + "</think>" + ANSWER if at % 2 else alphabet[:60]
        assert decode(result["sequences"][0]["ids"]) == expected


@BOTH
@pytest.mark.parametrize("case", [case for case in HAPPENINGS if "ended by" in case[1]], ids=": ".join)
def test_a_user_ends_a_thought_within_a_step(outcomes: dict[str, Any], engine: str, case: tuple[str, str]) -> None:
    result = outcomes[engine][case]
    text, kind, after = decode(result["sequences"][0]["ids"]), case[0], HAPPENINGS[case]["close_after"]
    thought, _, rest = text.partition("</think>" if kind == "single" else "])~")
    assert result["closed"]
    assert "abcdefghijklmnopqrstuvwxyz".startswith(thought)
    # A step of the speculative engine brings five tokens at most.
    assert after <= len(thought) <= after + (0 if engine == "plain" else 4)
    assert rest == ANSWER


@BOTH
def test_an_aborted_request_leaves_nothing_behind(outcomes: dict[str, Any], engine: str) -> None:
    ids = outcomes[engine]["single", "aborted"]["sequences"][0]["ids"]
    assert 5 <= len(ids) <= 9 and "abcdefghijklm".startswith(decode(ids))


@BOTH
def test_log_probabilities_stand_beside_their_tokens_and_are_the_models_own(
    outcomes: dict[str, Any], engine: str
) -> None:
    (sequence,) = outcomes[engine]["single", "with log-probabilities"]["sequences"]
    assert decode(sequence["ids"]) == "abc</think>" + ANSWER
    scripted = -math.log(1 + (VOCAB_SIZE - 1) * math.exp(-STRENGTH))
    for token, at in zip(sequence["ids"], sequence["logprobs"], strict=True):
        # The end was forced: the model would have said "d".
        expected = scripted - STRENGTH if token == SHUT else scripted
        assert at[str(token)] == pytest.approx(expected, abs=1e-5)


def replay(markers: ThinkingMarkers, limits: ThinkingLimits, asked: Any, ids: list[int]) -> ThinkingMachine:
    """The machine after these tokens; fails where one is not the token that had to come."""
    machine = ThinkingMachine.after_prompt(markers, limits, asked["prompt"])
    for token in ids:
        assert machine.forced in (None, token)
        machine.feed((token,))
    return machine


@BOTH
def test_several_sequences_hold_the_budget_each(outcomes: dict[str, Any], engine: str) -> None:
    case = "single", "four at once"
    sequences = outcomes[engine][case]["sequences"]
    assert len(sequences) == 4
    for sequence in sequences:
        machine = replay(SINGLE, ThinkingLimits(9), HAPPENINGS[case], sequence["ids"])
        assert 0 < machine.num_thinking <= 9


@BOTH
@pytest.mark.parametrize("case", [case for case in HAPPENINGS if "at random" in case[1]], ids=": ".join)
def test_random_tokens_obey_the_machine_at_each_step(
    outcomes: dict[str, Any], engine: str, case: tuple[str, str]
) -> None:
    limits = ThinkingLimits(9, grace=3, loop=LoopRule(1, 4, 5))
    (sequence,) = outcomes[engine][case]["sequences"]
    machine = replay(MARKERS[case[0]], limits, HAPPENINGS[case], sequence["ids"])
    assert len(sequence["ids"]) == 50
    assert machine.num_thinking <= 9 and machine.reason is not None
