"""Budgets in vLLM's V2 model runner, with the pocket model: the machine's own token sequences, drafts or not.

On a CPU the runner runs under Triton's interpreter (see v2_run.py), on a GPU compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from beside import Script, outcome
from thinking_v2_jobs import END, ENGINES, MARKERS, PHRASE, PLANS, prompts
from vllm_puzzle.kernels import thinking
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMachine

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
BESIDE = tuple(Script(HERE / "thinking_v2_jobs.py", (runner,)) for runner in ("2", "1"))


@pytest.fixture(scope="module")
def v2() -> dict[str, dict[str, Any]]:
    return dict(zip([*ENGINES, "closed", "free"], outcome(BESIDE[0]), strict=True))


@pytest.fixture(scope="module")
def v1() -> dict[str, Any]:
    return outcome(BESIDE[1])[0]


def limits(plan: dict[str, Any] | None) -> ThinkingLimits:
    if plan is None:
        return ThinkingLimits()
    return ThinkingLimits(plan["budget"], plan["grace"], plan["loop"] and LoopRule(*plan["loop"]))


def requests(result: dict[str, Any]) -> list[tuple[list[int], ThinkingLimits, list[int]]]:
    plans = [*PLANS, *PLANS[::-1]]
    tokens = [tokens for tokens_of_round in result["rounds"] for tokens in tokens_of_round]
    return [(p, limits(plan), t) for p, plan, t in zip(prompts(), plans, tokens, strict=False)]


def test_it_is_the_v2_runner_with_our_class_and_the_events_happened(v2: dict[str, dict[str, Any]]) -> None:
    for name in ENGINES:
        assert v2[name]["is_v2"] and v2[name]["budgets"] == "DeviceThinkingBudgets", name
    assert v2["drafts"]["accepted"] > 20
    assert v2["preempted"]["preemptions"] > 0


@pytest.mark.parametrize("name", ENGINES)
def test_every_forced_token_came_and_no_budget_was_passed(v2: dict[str, dict[str, Any]], name: str) -> None:
    reasons = set()
    for prompt, allowed, tokens in requests(v2[name]):
        machine = ThinkingMachine.after_prompt(MARKERS, allowed, prompt)
        for token in tokens:
            assert machine.forced in (None, token)
            machine.feed([token])
        assert machine.num_thinking <= (machine.num_tokens if allowed.budget is None else allowed.budget)
        reasons.add(machine.reason)
    assert reasons >= {"natural", "budget"}


@pytest.mark.parametrize("name", ["drafts", "preempted"])
def test_drafts_and_preemption_change_no_token(v2: dict[str, dict[str, Any]], name: str) -> None:
    assert v2[name]["rounds"] == v2["plain"]["rounds"]


def test_both_runners_give_the_same_tokens(v1: dict[str, Any], v2: dict[str, dict[str, Any]]) -> None:
    assert not v1["is_v2"]
    assert v1["rounds"] == v2["plain"]["rounds"]


def test_a_request_without_limits_says_what_it_says_among_others_without_limits(
    v2: dict[str, dict[str, Any]],
) -> None:
    index = PLANS.index(None)
    assert v2["plain"]["rounds"][0][index] == v2["free"]["rounds"][0][index]


def test_a_user_ends_open_thoughts_of_requests_without_limits(
    v2: dict[str, dict[str, Any]],
) -> None:
    phrase = [*PHRASE, END]
    for prompt, closed, free in zip(prompts(), v2["closed"]["rounds"][0], v2["free"]["rounds"][0], strict=False):
        cut = next(at for at, (a, b) in enumerate(zip(closed, free, strict=False)) if a != b)
        assert closed[cut : cut + len(phrase)] == phrase and cut in (5, 6, 7)
        machine = ThinkingMachine.after_prompt(MARKERS, ThinkingLimits(), prompt)
        machine.feed(closed[:cut])
        machine.close(thinking.USER)
        machine.feed(closed[cut:])
        assert machine.reason == "user" and machine.num_answer > 0
