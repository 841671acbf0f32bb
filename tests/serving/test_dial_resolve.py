"""What a wish becomes for each family: template arguments, level, budget, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
from dial_models import dial, wish
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.kernels.thinking import LoopRule
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.policy import Grace, ReasoningPolicy, read_policy
from vllm_puzzle.serving.dial.request import EFFORTS, RequestError
from vllm_puzzle.serving.dial.resolve import Requested, nearest, resolve, within

ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


def policy(**document: Any) -> ReasoningPolicy:
    return read_policy(document, "test")


@pytest.mark.parametrize(
    ("family", "asked", "arguments", "budget"),
    [
        ("Qwen", {}, {}, None),
        ("Qwen", {"is_on": True}, ON, None),
        ("Qwen", {"is_on": False}, OFF, None),
        ("Qwen", {"is_on": False, "budget": 0}, OFF, None),
        ("Qwen", {"is_on": True, "budget": 9}, ON, 9),
        ("Qwen", {"is_on": True, "budget": -1}, ON, None),
        ("Qwen", {"is_on": True, "effort": "high"}, ON, None),
        ("3 Super", {"is_on": True, "effort": "minimal"}, {**ON, "low_effort": True}, None),
        ("3 Super", {"is_on": True, "effort": "high"}, ON, None),
        ("3 Super", {"keeps_history": True}, {"truncate_history_thinking": False}, None),
        ("3 Ultra", {"is_on": True, "effort": "low"}, {**ON, "medium_effort": True}, None),
        ("3 Ultra", {"is_on": True, "budget": 40}, {**ON, "reasoning_budget": 40}, 40),
        ("3 Nano", {"is_on": True, "effort": "low"}, ON, None),
        ("Kimi", {"is_on": False}, {**OFF, "thinking": False}, None),
        ("Kimi", {"is_on": True, "effort": "max"}, {**ON, "thinking": True, "thinking_effort": "max"}, None),
        ("on demand", {}, {**OFF, "thinking": False}, None),
        ("on demand", {"is_on": True}, {**ON, "thinking": True}, None),
        ("49B v1", {"is_on": False}, OFF, None),
        # The thought is open in the prompt until it is closed: vLLM's parser must look for its end.
        ("no switch", {"is_on": False}, ON, 0),
        ("no switch", {"is_on": True, "budget": 5}, ON, 5),
        ("gpt-oss", {"is_on": True, "effort": "xhigh"}, {**ON, "reasoning_effort": "high"}, None),
        ("gpt-oss", {"is_on": False}, {**ON, "reasoning_effort": "low"}, 512),
        ("gpt-oss-puzzle", {"is_on": False, "budget": 0}, {**ON, "reasoning_effort": "low"}, 512),
    ],
)
def test_a_wish_becomes_template_arguments_and_a_budget(
    family: str, asked: dict[str, Any], arguments: dict[str, Any], budget: int | None
) -> None:
    done = resolve(wish(**asked), dial(family))
    assert (dict(done.template_arguments), done.budget) == (arguments, budget)


def test_a_model_that_only_a_level_switches_off_gets_that_level() -> None:
    by_level = dial("by level", has_budget=False)
    done = resolve(wish(is_on=False), by_level)
    assert (done.effort, done.budget, done.is_on) == ("none", None, False)
    assert resolve(wish(is_on=True, effort="high"), by_level).template_arguments["reasoning_effort"] == "high"
    assert resolve(wish(is_on=False), dial("Qwen")).effort is None


def test_what_a_model_or_a_server_cannot_do_is_refused_by_field() -> None:
    for asked in ({"is_on": True, "budget": 5}, {"is_on": False}):
        for family in ("no switch", "gpt-oss"):
            with pytest.raises(RequestError, match="allowed with --reasoning-parser"):
                resolve(wish(**asked), dial(family, has_budget=False))
    with pytest.raises(RequestError, match="`keeps_history`: found with a model whose template has no such rule"):
        resolve(wish(keeps_history=False), dial("Qwen"))


def test_the_nearest_level_is_taken_and_said_or_refused_where_the_operator_is_strict() -> None:
    done = resolve(wish(is_on=True, effort="xhigh"), dial("gpt-oss"))
    assert (done.effort, done.notes) == ("high", ("effort xhigh: nearest level is high",))
    assert done.requested == Requested("on", "xhigh", None)
    with pytest.raises(RequestError, match="`effort`: found 'xhigh', allowed: low, medium, high") as caught:
        resolve(wish(is_on=True, effort="xhigh"), dial("gpt-oss", policy(strict=True)))
    assert caught.value.param == "effort"
    assert resolve(wish(is_on=True, effort="high"), dial("gpt-oss", policy(strict=True))).effort == "high"
    none = resolve(wish(is_on=True, effort="low"), dial("Qwen"))
    assert (none.effort, none.notes) == (None, ("effort low: the model has no levels, it thinks as it does",))
    with pytest.raises(RequestError, match="none of them"):
        resolve(wish(is_on=True, effort="low"), dial("Qwen", policy(strict=True)))


def test_of_two_equally_near_levels_the_stronger_is_taken() -> None:
    assert nearest("medium", ("low", "high")) == "high"
    assert [nearest(effort, ("low", "high")) for effort in EFFORTS] == ["low", "low", "high", "high", "high", "high"]


def test_an_effort_has_the_budget_of_the_operators_map_for_that_model() -> None:
    measured = policy(budgets={"low": 7, "high": 60, "max": -1, "gpt-oss": {"low": 5}})
    budgets = {e: resolve(wish(is_on=True, effort=e), dial("Qwen", measured)).budget for e in EFFORTS}
    assert budgets == {"minimal": 7, "low": 7, "medium": 60, "high": 60, "xhigh": None, "max": None}
    done = resolve(wish(is_on=True, effort="medium"), dial("Qwen", measured))
    assert (done.effort, done.notes) == ("high", ("effort medium: nearest level is high",))
    other = resolve(wish(is_on=True, effort="high"), dial("gpt-oss", measured))
    assert (other.effort, other.budget, other.notes) == ("high", 5, ("effort high: nearest budget is that of low",))
    assert resolve(wish(is_on=True), dial("Qwen", measured)).budget is None, "only an effort asks for its budget"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"is_on": True, "effort": "high", "budget": 9}, 9),  # 1: the budget before the effort
        ({"is_on": True, "effort": "high", "budget": -1}, 100),  # no limit is the ceiling
        ({"is_on": True, "effort": "high"}, 60),  # 2: the effort before the default
        ({}, 7),  # 5: the server's default
        ({"is_on": True}, 7),
        ({"is_on": True, "budget": 101}, 100),
        ({"is_on": True, "effort": "max"}, 100),
    ],
)
def test_the_stronger_word_wins_and_the_ceiling_holds(asked: dict[str, Any], expected: int) -> None:
    served = dial("Qwen", policy(default="low", budgets={"low": 7, "high": 60, "max": -1}, ceiling=100))
    assert resolve(wish(**asked), served).budget == expected


def test_a_lowered_budget_is_said() -> None:
    served = dial("Qwen", policy(ceiling=100))
    assert resolve(wish(is_on=True, budget=101), served).notes == ("budget 101: the server's ceiling is 100",)
    assert resolve(wish(is_on=True, budget=-1), served).notes == ("no limit: the server's ceiling is 100",)
    assert resolve(wish(), served).notes == ()


def test_a_template_is_told_a_budget_that_somebody_asked_for_and_no_ceiling() -> None:
    served = dial("3 Ultra", policy(ceiling=100, budgets={"high": 60}))
    assert "reasoning_budget" not in resolve(wish(is_on=True), served).template_arguments
    assert resolve(wish(is_on=True, effort="high"), served).template_arguments["reasoning_budget"] == 60
    assert resolve(wish(is_on=True, budget=900), served).template_arguments["reasoning_budget"] == 100
    assert "reasoning_budget" not in resolve(wish(is_on=True, budget=-1), served).template_arguments


def test_text_beats_the_default_and_a_field_beats_text() -> None:
    served = dial("49B v1", policy(default="off"))
    assert resolve(wish(), served).is_on is False
    assert resolve(wish(), served, [True]).is_on is True
    assert resolve(wish(), served, [True, False, True]).is_on is True, "the last one wins"
    done = resolve(wish(is_on=False), served, [True])
    assert done.is_on is False
    assert done.notes[0] == "a system line `detailed thinking`: `is_on` says otherwise, and wins"
    assert done.template_arguments == OFF


def test_text_is_not_read_where_the_operator_says_so() -> None:
    done = resolve(wish(), dial("49B v1", policy(soft_switches=False)), [False])
    assert done.is_on is None
    assert "not used by this server" in done.notes[0]


def test_the_default_may_differ_by_model() -> None:
    served = policy(default={"Qwen": "off", "*": "high"})
    assert resolve(wish(), dial("Qwen", served)).is_on is False
    done = resolve(wish(), dial("gpt-oss", served))
    assert (done.is_on, done.effort, done.requested) == (True, "high", Requested())
    assert resolve(wish(is_on=False), dial("3 Super", served)).effort is None


def test_a_ceiling_of_0_is_off_for_everybody() -> None:
    served = dial("Qwen", policy(ceiling=0, default="high"))
    for asked in ({}, {"is_on": True, "budget": 9}, {"is_on": True, "effort": "max"}):
        done = resolve(wish(**asked), served)
        assert (done.is_on, done.budget, done.effort, done.template_arguments) == (False, None, None, OFF)
    assert resolve(wish(is_on=True), served).notes == ("on: the server's ceiling is 0 thinking tokens",)


def test_the_ceiling_holds_for_a_model_that_thinks_though_it_is_off() -> None:
    assert resolve(wish(is_on=False), dial("49B v1", policy(ceiling=50))).budget == 50
    assert resolve(wish(is_on=False), dial("gpt-oss", policy(ceiling=50))).budget == 50


def test_a_model_without_an_off_state_reasons_shortly_and_hidden() -> None:
    for asked in ({"is_on": False}, {"is_on": False, "budget": 0}, {"is_on": False, "is_visible": True}):
        done = resolve(wish(**asked), dial("gpt-oss"))
        assert (done.is_on, done.effort, done.is_visible, done.is_short) == (True, "low", False, True)
        assert done.requested.mode == "off"
        assert done.notes == ("off: gpt-oss always reasons; hidden, level low, at most 512 tokens",)
    assert within(resolve(wish(is_on=False), dial("gpt-oss")), 90, 6).budget == 60, "two thirds"
    assert within(resolve(wish(is_on=False), dial("gpt-oss")), 9000, 6).budget == 512


def test_a_switch_at_the_start_of_the_prompt_is_said_to_cost_the_prefix_cache() -> None:
    for family, costs in (("49B v1", True), ("49B v1.5", True), ("Nano v2", False), ("Qwen", False)):
        notes = resolve(wish(is_on=False), dial(family)).notes
        assert any("prefix cache" in note for note in notes) is costs, family


def test_grace_loop_and_sampling_come_from_policy_and_profile() -> None:
    served = dial("3 Super", policy(loop={"max_pattern_size": 9, "min_count": 3}, grace={"share": 0.5, "cap": 20}))
    done = resolve(wish(is_on=True, budget=30), served)
    assert (done.grace, done.loop) == (15, LoopRule(1, 9, 3))
    assert resolve(wish(is_on=True, budget=100), served).grace == 20
    assert resolve(wish(is_on=True), served).grace == 0
    assert resolve(wish(is_on=True), dial("49B v1")).sampling == {"temperature": 0.6, "top_p": 0.95}
    assert resolve(wish(is_on=False), dial("49B v1")).sampling == {"temperature": 0}


@pytest.mark.parametrize(
    ("reserve", "budget", "max_tokens", "closing", "expected"),
    [
        (None, 100, 1000, 1, 100),  # 1000 - 250 - 1 is enough
        (None, 749, 1000, 1, 749),
        (None, 750, 1000, 1, 749),
        (None, 9000, 10_000, 3, 8973),  # at most 1024 are kept
        (None, 5, 4, 1, 2),
        (None, 5, 1, 1, 0),
        (None, None, 1000, 1, None),  # the automatic reserve is for budgets
        (200, None, 1000, 2, 798),
        (200, 900, 1000, 2, 798),
        (2000, None, 1000, 2, 0),
        (0, None, 1000, 1, None),
        (0, 5000, 1000, 1, 999),
        (0, 999, 1000, 1, 999),
    ],
)
def test_room_for_the_answer_is_kept_of_max_tokens(
    reserve: int | None, budget: int | None, max_tokens: int, closing: int, expected: int | None
) -> None:
    served = dial("Qwen", policy(answer_reserve=reserve))
    asked = wish(is_on=True) if budget is None else wish(is_on=True, budget=budget)
    done = resolve(asked, served)
    fitted = within(done, max_tokens, closing)
    assert fitted.budget == expected
    assert (len(fitted.notes) == 1) is (expected != budget)
    assert fitted.grace == Grace().tokens(expected)


def test_room_for_the_answer_changes_nothing_when_off_and_leaves_a_puzzle_its_first_token() -> None:
    off = resolve(wish(is_on=False), dial("Qwen", policy(answer_reserve=10)))
    assert within(off, 5, 1) is off
    assert within(resolve(wish(is_on=True, budget=9), dial("gpt-oss-puzzle")), 4, 6).budget == 1


def test_a_policy_that_the_server_or_the_model_cannot_hold_stops_the_start() -> None:
    for document, key in (
        ({"ceiling": 5}, "ceiling"),
        ({"budgets": {"low": 5}}, "budgets"),
        ({"loop": {"max_pattern_size": 5, "min_count": 3}}, "loop"),
        ({"default": "off"}, "default"),
    ):
        with pytest.raises(ConfigError, match=f"reasoning policy, key `{key}`: found .*, allowed: .*reasoning-parser"):
            dial("no switch", policy(**document), has_budget=False)
    with pytest.raises(ConfigError, match="key `ceiling`: found 0, allowed: at least 1 with this model"):
        dial("gpt-oss-puzzle", policy(ceiling=0))


@given(
    family=st.sampled_from(("Qwen", "3 Super", "gpt-oss", "gpt-oss-puzzle", "no switch", "49B v1", "on demand")),
    mode=st.sampled_from((None, True, False)),
    effort=st.none() | st.sampled_from(EFFORTS),
    budget=st.none() | st.integers(-1, 2000),
    text=st.lists(st.booleans(), max_size=2),
    ceiling=st.integers(1, 1500),
    default=st.sampled_from((None, "on", "off", "low", "max")),
    max_tokens=st.integers(1, 3000),
)
def test_no_request_passes_the_ceiling(
    family: str, mode: Any, effort: Any, budget: Any, text: Any, ceiling: int, default: Any, max_tokens: int
) -> None:
    asked: dict[str, Any] = {"is_on": mode, "effort": effort, "budget": budget}
    if mode is False or budget == 0:
        asked = {"is_on": False, "effort": None, "budget": 0 if budget is not None else None}
    elif effort is not None or budget is not None:
        asked["is_on"] = True
    served = dial(family, policy(ceiling=ceiling, default=default, budgets={"low": 900, "max": -1}))
    done = resolve(wish(**asked), served, text if served.profile.text else ())
    fitted = within(done, max_tokens, 1)
    assert done.budget is not None
    assert 0 <= done.budget <= ceiling
    assert fitted.budget is not None
    assert served.profile.min_budget * (done.is_on is True) <= fitted.budget <= done.budget
    assert not done.is_on or done.template_arguments["enable_thinking"] is True
    assert all("\n" not in note for note in done.notes)
