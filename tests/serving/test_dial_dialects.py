"""Every ecosystem's reasoning fields are read as the one request that they mean; contradictions are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_puzzle.serving.dial.dialects import FIELDS, read_statements
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError, combine

ON, OFF = ReasoningRequest(is_on=True), ReasoningRequest(is_on=False)


def effort(level: str) -> ReasoningRequest:
    return ReasoningRequest(is_on=True, effort=level)


def budget(tokens: int) -> ReasoningRequest:
    return ReasoningRequest(is_on=tokens != 0, budget=tokens)


def visible(is_visible: bool) -> ReasoningRequest:
    return ReasoningRequest(is_visible=is_visible)


def kept(keeps: bool) -> ReasoningRequest:
    return ReasoningRequest(keeps_history=keeps)


DIALECTS: list[tuple[str, dict[str, Any], ReasoningRequest]] = [
    ("silent", {"model": "m", "messages": []}, ReasoningRequest()),
    ("null says nothing", {"reasoning_effort": None, "thinking": None, "reasoning": {}}, ReasoningRequest()),
    ("OpenAI chat", {"reasoning_effort": "minimal"}, effort("minimal")),
    ("OpenAI chat off", {"reasoning_effort": "none"}, OFF),
    ("OpenAI responses", {"reasoning": {"effort": "xhigh"}}, effort("xhigh")),
    ("OpenAI responses summary", {"reasoning": {"summary": "auto"}}, visible(True)),
    ("OpenAI responses context", {"reasoning": {"context": "current_turn"}}, kept(False)),
    ("OpenRouter budget", {"reasoning": {"max_tokens": 300}}, budget(300)),
    ("OpenRouter off", {"reasoning": {"enabled": False}}, OFF),
    ("OpenRouter hidden", {"reasoning": {"exclude": True}}, visible(False)),
    ("Anthropic", {"thinking": {"type": "enabled", "budget_tokens": 7}}, budget(7)),
    ("Anthropic off", {"thinking": {"type": "disabled"}}, OFF),
    ("Anthropic adaptive", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, effort("low")),
    ("Anthropic between tools", {"thinking": {"type": "between_tools"}}, ReasoningRequest()),
    (
        "Anthropic omitted",
        {"thinking": {"type": "enabled", "display": "omitted"}},
        ReasoningRequest(is_on=True, is_visible=False),
    ),
    ("Gemini", {"google": {"thinking_config": {"thinking_budget": 0}}}, budget(0)),
    ("Gemini level", {"extra_body": {"google": {"thinking_config": {"thinking_level": "high"}}}}, effort("high")),
    ("Gemini dynamic", {"google": {"thinking_config": {"thinking_budget": -1}}}, budget(-1)),
    ("DeepSeek", {"thinking": {"type": "enabled"}, "reasoning_effort": "ultra"}, effort("max")),
    (
        "GLM history",
        {"thinking": {"type": "enabled", "clear_thinking": False}},
        ReasoningRequest(True, keeps_history=True),
    ),
    ("Kimi", {"chat_template_kwargs": {"thinking": False}}, OFF),
    ("Kimi effort", {"chat_template_kwargs": {"thinking_effort": "low"}}, effort("low")),
    ("Qwen", {"enable_thinking": True, "thinking_budget": 50}, budget(50)),
    ("Qwen template", {"chat_template_kwargs": {"enable_thinking": False}}, OFF),
    ("Ollama", {"think": True}, ON),
    ("Ollama level", {"think": "medium"}, effort("medium")),
    ("NIM", {"nvext": {"max_thinking_tokens": 9}}, budget(9)),
    (
        "Nemotron 3",
        {"chat_template_kwargs": {"low_effort": True, "reasoning_budget": 40}},
        ReasoningRequest(True, "low", 40),
    ),
    ("Nemotron 3 plain", {"chat_template_kwargs": {"low_effort": False}}, ReasoningRequest()),
    ("Nemotron history", {"chat_template_kwargs": {"truncate_history_thinking": False}}, kept(True)),
    ("llama.cpp", {"thinking_budget_tokens": 12, "reasoning_format": "deepseek"}, budget(12)),
    ("SGLang", {"custom_params": {"thinking_budget": 5}, "separate_reasoning": True}, budget(5)),
    (
        "vLLM, TensorRT-LLM, Dynamo",
        {"thinking_token_budget": 8, "include_reasoning": False},
        ReasoningRequest(True, None, 8, False),
    ),
    ("the same twice", {"reasoning_effort": "low", "reasoning": {"effort": "low"}, "think": True}, effort("low")),
]


@pytest.mark.parametrize(("body", "expected"), [d[1:] for d in DIALECTS], ids=[d[0] for d in DIALECTS])
def test_a_dialect_means_one_request(body: dict[str, Any], expected: ReasoningRequest) -> None:
    assert combine(read_statements(body)) == expected


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"reasoning_effort": "none", "think": True}, "reasoning_effort", "think"),
    ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort", "reasoning.effort"),
    ({"reasoning_effort": "high", "thinking_token_budget": 0}, "reasoning_effort", "thinking_token_budget"),
    ({"thinking": {"type": "disabled", "budget_tokens": 4}}, "thinking.type", "thinking.budget_tokens"),
    ({"thinking_budget": 4, "reasoning_budget": 5}, "thinking_budget", "reasoning_budget"),
    ({"include_reasoning": True, "reasoning": {"exclude": True}}, "include_reasoning", "reasoning.exclude"),
    (
        {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "max"},
        "reasoning_effort",
        "chat_template_kwargs.enable_thinking",
    ),
]


@pytest.mark.parametrize(("body", "one", "other"), CONTRADICTIONS)
def test_a_contradiction_names_both_fields(body: dict[str, Any], one: str, other: str) -> None:
    with pytest.raises(RequestError) as caught:
        combine(read_statements(body))
    assert f"`{one}`" in str(caught.value)
    assert f"`{other}`" in str(caught.value)
    assert caught.value.param in (one, other)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"reasoning_effort": "huge"}, "`reasoning_effort`: found 'huge', allowed: none, minimal"),
    ({"reasoning_effort": 3}, "`reasoning_effort`: found 3"),
    ({"reasoning": "high"}, "`reasoning`: found 'high', allowed: an object"),
    ({"reasoning": {"efort": "high"}}, "`reasoning.efort`: found an unknown reasoning field"),
    ({"thinking": {"type": "maybe"}}, "`thinking.type`: found 'maybe', allowed: enabled, disabled"),
    ({"thinking": True}, "`thinking`: found True, allowed: an object"),
    ({"thinking_token_budget": True}, "`thinking_token_budget`: found True, allowed: an integer"),
    ({"thinking_token_budget": 2.0}, "found 2.0"),
    ({"thinking_token_budget": -2}, "found -2"),
    ({"thinking_budget": "9"}, "found '9'"),
    ({"chat_template_kwargs": {"enable_thinking": "false"}}, "found 'false', allowed: true, false"),
    ({"chat_template_kwargs": {"enable_thinkin": True}}, "`chat_template_kwargs.enable_thinkin`: found an unknown"),
    ({"thinking_tokens": 5}, "`thinking_tokens`: found an unknown reasoning field"),
    ({"max_reasoning_tokens": 5}, "`max_reasoning_tokens`: found an unknown reasoning field"),
    ({"separate_reasoning": False}, "found False, allowed: true (thoughts are always separate)"),
    ({"reasoning": {"mode": "pro"}}, "`reasoning.mode`: found 'pro', allowed: standard"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_a_wrong_or_unknown_field_is_refused_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        combine(read_statements(body))
    assert message in str(caught.value)


def test_every_field_says_something_or_refuses_whatever_it_holds() -> None:
    """No value of any JSON type makes a reader fail otherwise than by a RequestError."""
    for field in FIELDS:
        for value in (None, True, False, 0, 1, -1, 10**12, 1.5, "", "on", "none", [], [1], {}, {"x": 1}, {"effort": 1}):
            for body in ({field: value}, {field: {"effort": value}}, {field: {"thinking_budget": value}}):
                try:
                    combine(read_statements(body))
                except RequestError as error:
                    assert error.param.startswith(field)


def test_fields_that_carry_thoughts_are_not_taken_for_controls() -> None:
    assert combine(read_statements({"reasoning_content": "so", "reasoning_details": []})) == ReasoningRequest()
