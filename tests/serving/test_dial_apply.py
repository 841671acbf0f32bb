"""What is done reaches vLLM's own request classes: messages, template arguments, level, budget."""

from __future__ import annotations

from typing import Any

import pytest
from dial_models import FAMILIES, dial, wish
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.template import Template
from vllm_puzzle.serving.reasoning_endpoint import apply_to_chat, apply_to_responses

USER = {"role": "user", "content": "3+4"}


def chat_request(*messages: Any, **fields: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest(model="m", messages=list(messages), **fields)


def responses_request(**fields: Any) -> Any:
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return ResponsesRequest(model="m", **fields)


def arguments_of(request: Any) -> dict[str, Any]:
    """The variables that vLLM renders the template with, and gives to its parsers."""
    found: dict[str, Any] = request.build_chat_params(None, "auto").chat_template_kwargs
    return found


@pytest.mark.parametrize("family", ["49B v1", "49B v1.5", "Nano v2", "Qwen", "3 Super", "Kimi", "on demand"])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_chat_request_renders_as_the_parser_is_told(family: str, is_on: bool) -> None:
    request = chat_request({"role": "system", "content": "Be brief."}, USER)
    apply_to_chat(request, wish(is_on=is_on), dial(family))
    arguments = arguments_of(request)
    assert arguments["enable_thinking"] is is_on
    template = Template(FAMILIES[family][2])
    known = {name: value for name, value in arguments.items() if name in template.arguments}  # as vLLM filters them
    prompt = template.render(request.messages, **known)
    assert prompt is not None
    if family == "49B v1":
        assert f"detailed thinking {'on' if is_on else 'off'}" in prompt
    else:
        assert prompt.rstrip().endswith("</think>") is not is_on


def test_a_level_reaches_the_template_and_the_field_that_gpt_oss_is_rendered_from() -> None:
    request = chat_request(USER)
    done = apply_to_chat(request, wish(is_on=True, effort="max"), dial("gpt-oss"))
    assert (request.reasoning_effort, done.effort) == ("high", "high")
    assert arguments_of(request)["reasoning_effort"] == "high"
    request = chat_request(USER, chat_template_kwargs={"other": 1})
    done = apply_to_chat(request, wish(is_on=True, effort="low", budget=9), dial("3 Super"))
    assert request.chat_template_kwargs == {"other": 1, "enable_thinking": True, "low_effort": True}
    # Where max_tokens is known, the engine client's wrapper writes the budget into the sampling parameters.
    assert (done.budget, request.thinking_token_budget) == (9, None)


def test_a_silent_request_stays_as_it_is() -> None:
    request = chat_request(USER)
    apply_to_chat(request, wish(), dial("49B v1"))
    assert (request.messages, request.chat_template_kwargs, request.reasoning_effort) == ([USER], None, None)
    plain = responses_request(input="3+4")
    apply_to_responses(plain, wish(), dial("49B v1"))
    assert (plain.input, plain.instructions, plain.reasoning) == ("3+4", None, None)


def test_anthropics_enabled_switches_on_what_thinks_on_demand_only() -> None:
    request = chat_request(USER)
    done = apply_to_chat(request, wish(is_on=True, budget=2000, is_visible=False), dial("on demand"))
    assert request.chat_template_kwargs == {"enable_thinking": True, "thinking": True}
    assert (done.budget, done.is_visible) == (2000, False)
    assert request.include_reasoning, "vLLM would start a grammar at the first token"


def test_a_responses_request_gets_text_level_and_budget() -> None:
    request = responses_request(input="3+4 /think", instructions="Be brief.")
    done = apply_to_responses(request, wish(is_on=False), dial("Nano v2"))
    assert (request.input, request.instructions) == ("3+4 /no_think", "Be brief.")
    assert len(done.notes) == 1
    assert arguments_of(request)["enable_thinking"] is False
    request = responses_request(input=[USER])
    apply_to_responses(request, wish(is_on=False), dial("49B v1"))
    assert (request.input, request.instructions) == ([USER], "detailed thinking off")
    request = responses_request(input="3+4")
    served = dial("gpt-oss", ReasoningPolicy(budgets={"*": {"low": 70}}))
    done = apply_to_responses(request, wish(is_on=True, effort="minimal"), served)
    assert request.reasoning.effort == "low"
    assert done.budget == 70


def test_a_turn_that_goes_on_from_an_unseen_one_says_its_state() -> None:
    request = responses_request(input="3+4", previous_response_id="resp_1")
    apply_to_responses(request, wish(is_on=True), dial("Nano v2"))
    assert request.input == "3+4 /think"
