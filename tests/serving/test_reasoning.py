"""The reasoning switch: three spellings, one meaning; contradictions are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_puzzle.serving.reasoning import RequestError, needs_system_line, read_switch, with_system_line

USER = {"role": "user", "content": "3+4"}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("messages", "kwargs", "effort", "is_on"),
    [
        ([USER], None, None, None),
        ([USER], {}, None, None),
        ([USER], {"enable_thinking": True}, None, True),
        ([USER], {"enable_thinking": False}, None, False),
        ([USER], None, "none", False),
        ([USER], None, "low", True),
        ([system("detailed thinking off"), USER], None, None, False),
        ([system("Be brief.\n Detailed Thinking ON "), USER], None, None, True),
        ([system([{"type": "text", "text": "detailed thinking off"}]), USER], None, None, False),
        ([system("please use detailed thinking on this"), USER], None, None, None),
        ([{"role": "user", "content": "detailed thinking off"}], None, None, None),
        ([system("detailed thinking off"), USER], {"enable_thinking": False}, "none", False),
    ],
)
def test_each_spelling_is_read(messages: list[Any], kwargs: Any, effort: Any, is_on: bool | None) -> None:
    assert read_switch(messages, kwargs, effort).is_on is is_on


@pytest.mark.parametrize(
    ("messages", "kwargs", "effort", "fields"),
    [
        ([USER], {"enable_thinking": True}, "none", ("`reasoning_effort` = 'none'", "enable_thinking")),
        ([USER], {"enable_thinking": False}, "high", ("`reasoning_effort` = 'high'", "enable_thinking")),
        ([system("detailed thinking on"), USER], {"enable_thinking": False}, None, ("system line", "enable_thinking")),
        ([system("detailed thinking on"), USER], None, "none", ("system line", "reasoning_effort")),
        ([system("detailed thinking on\ndetailed thinking off"), USER], None, None, ("system line",)),
    ],
)
def test_a_contradiction_names_both_fields(
    messages: list[Any], kwargs: Any, effort: Any, fields: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        read_switch(messages, kwargs, effort)
    assert all(field in str(caught.value) for field in fields)


@pytest.mark.parametrize("value", ["false", 0, 1, [], {}])
def test_a_switch_that_is_no_boolean_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="allowed: true, false"):
        read_switch([USER], {"enable_thinking": value}, None)


@pytest.mark.parametrize(
    ("template", "model_type", "expected"),
    [
        ("{{ enable_thinking }}", "llama", False),
        ("{% if 'no_think' in system %}", "nemotron-nas", False),
        ("{{ messages }}", "nemotron-nas", True),
        ("{% set s = 'detailed thinking on' %}", "llama", True),
        ("{{ messages }}", "llama", False),
    ],
)
def test_the_system_line_is_for_models_that_have_no_other_switch(
    template: str, model_type: str, expected: bool
) -> None:
    assert needs_system_line(template, model_type) is expected


def test_the_line_joins_a_system_message_or_starts_one_and_is_never_doubled() -> None:
    assert with_system_line([USER], False) == [system("detailed thinking off"), USER]
    assert with_system_line([system("Be brief."), USER], True) == [system("detailed thinking on\nBe brief."), USER]
    already = [system("detailed thinking on"), USER]
    assert with_system_line(already, True) == already
