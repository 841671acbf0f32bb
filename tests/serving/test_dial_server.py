"""The official clients against the real server: each ecosystem's own knob has its effect, streamed and not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai
import pytest
import server

pytestmark = pytest.mark.slow

QUESTION = "12+30-5"
MODEL = "pocket-puzzle"
CHAT: list[Any] = [{"role": "user", "content": QUESTION}]

OFF: dict[str, dict[str, Any]] = {
    "OpenAI": {"reasoning_effort": "none"},
    "OpenRouter": {"reasoning": {"enabled": False}},
    "Anthropic, DeepSeek, GLM": {"thinking": {"type": "disabled"}},
    "Gemini": {"extra_body": {"google": {"thinking_config": {"thinking_budget": 0}}}},
    "Qwen": {"enable_thinking": False},
    "Kimi": {"chat_template_kwargs": {"thinking": False}},
    "Ollama": {"think": False},
    "vLLM": {"thinking_token_budget": 0},
}
BUDGET: dict[str, Any] = {
    "OpenRouter": lambda n: {"reasoning": {"max_tokens": n}},
    "Anthropic": lambda n: {"thinking": {"type": "enabled", "budget_tokens": n}},
    "Gemini": lambda n: {"google": {"thinking_config": {"thinking_budget": n}}},
    "Qwen": lambda n: {"thinking_budget": n},
    "llama.cpp": lambda n: {"thinking_budget_tokens": n},
    "NIM": lambda n: {"nvext": {"max_thinking_tokens": n}},
    "SGLang": lambda n: {"custom_params": {"thinking_budget": n}},
    "vLLM, TensorRT-LLM": lambda n: {"thinking_token_budget": n},
}
FREE: dict[str, dict[str, Any]] = {
    "silent": {},
    "OpenAI": {"reasoning_effort": "high"},
    "Ollama": {"think": "low"},
    "no limit": {"thinking_token_budget": -1},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server.running(tmp_path_factory.mktemp("dial") / "log.txt") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


@pytest.fixture(scope="module")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none")


def chat(client: openai.OpenAI, knob: dict[str, Any]) -> tuple[str, str, int]:
    """(thinking, answer, thinking tokens) of one chat completion; the knob goes into the body as it is."""
    reply: Any = client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, extra_body=knob)
    message = reply.choices[0].message
    return message.reasoning or "", message.content or "", reply.usage.completion_tokens_details.reasoning_tokens


@pytest.mark.parametrize("name", OFF)
def test_off_in_every_dialect_answers_without_a_thought(client: openai.OpenAI, name: str) -> None:
    thinking, answer, tokens = chat(client, OFF[name])
    assert (thinking, tokens) == ("", 0)
    assert answer.strip().isdigit()


@pytest.mark.parametrize("name", BUDGET)
def test_a_budget_in_every_dialect_is_held_and_an_answer_follows(client: openai.OpenAI, name: str) -> None:
    free, _, length = chat(client, {})
    for budget in (1, 8, length - 1, length, length + 1):
        thinking, answer, tokens = chat(client, BUDGET[name](budget))
        # One character is one token, and greedy decoding thinks the same until it is stopped.
        assert thinking == free[:budget]
        assert tokens == min(budget, length)
        assert answer.strip()


@pytest.mark.parametrize("name", FREE)
def test_a_level_or_no_limit_leaves_the_model_its_own_length(client: openai.OpenAI, name: str) -> None:
    assert chat(client, FREE[name]) == chat(client, {})


def chat_after(client: openai.OpenAI, line: str, knob: dict[str, Any]) -> tuple[str, str]:
    messages: Any = [{"role": "system", "content": line}, *CHAT]
    reply: Any = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, extra_body=knob)
    return reply.choices[0].message.reasoning or "", reply.choices[0].message.content or ""


def test_a_system_line_switches_and_a_field_beats_it(client: openai.OpenAI) -> None:
    free, off = chat(client, {})[:2], chat(client, {"think": False})[:2]
    assert chat_after(client, "detailed thinking off", {}) == off
    assert chat_after(client, "detailed thinking off", {"think": True}) == free
    assert chat_after(client, "detailed thinking on", {"reasoning_effort": "none"}) == off
    assert chat_after(client, "detailed thinking off\ndetailed thinking on", {}) == free


def test_a_hidden_thought_is_thought_all_the_same(client: openai.OpenAI) -> None:
    _, answer, tokens = chat(client, {})
    assert chat(client, {"reasoning": {"exclude": True}}) == ("", answer, tokens)


def test_a_thought_has_both_names_that_clients_read(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CHAT, "temperature": 0}
    message: Any = client.chat.completions.create(**options).choices[0].message
    assert message.reasoning_content == message.reasoning
    assert message.reasoning
    streamed = "".join(
        getattr(choice.delta, "reasoning_content", None) or ""
        for chunk in client.chat.completions.create(**options, stream=True)
        for choice in chunk.choices
    )
    assert streamed == message.reasoning


DIGIT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "integer"}}}


@pytest.mark.parametrize("knob", [{}, {"include_reasoning": False}, {"thinking_budget": 8}])
def test_a_schema_starts_after_the_thought_even_a_hidden_one(client: openai.OpenAI, knob: dict[str, Any]) -> None:
    thinking, answer, tokens = chat(client, {**knob, "response_format": DIGIT})
    free = chat(client, {})
    assert answer.strip().isdigit()
    assert tokens == min(knob.get("thinking_budget", free[2]), free[2])
    assert thinking == ("" if knob.get("include_reasoning") is False else free[0][:tokens])


@pytest.mark.parametrize("knob", [{"think": False}, {"thinking_budget": 8}, {"reasoning": {"exclude": True}}, {}])
def test_a_stream_is_the_same_text(client: openai.OpenAI, knob: dict[str, Any]) -> None:
    thinking, answer, tokens = "", "", None
    stream: Any = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, extra_body=knob, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens_details.reasoning_tokens
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning", None) or ""
            answer += choice.delta.content or ""
    assert (thinking, answer, tokens) == chat(client, knob)


def test_defect_2_2_max_tokens_leave_room_for_the_answer(client: openai.OpenAI) -> None:
    free, _, length = chat(client, {})
    assert length == 17
    reply: Any = client.chat.completions.create(
        model=MODEL, messages=CHAT, temperature=0, max_tokens=16, extra_body={"thinking_budget": 100}
    )
    # A quarter of max_tokens and the end marker: without them the thought takes all 16, and nothing is answered.
    assert reply.choices[0].message.reasoning == free[: 16 - 4 - 1]
    assert reply.choices[0].message.content.strip().isdigit()
    assert reply.reasoning_info["requested"]["budget"] == 100
    assert reply.reasoning_info["effective"]["budget"] == 11
    assert reply.reasoning_info["notes"] == ["budget 100: 11 fit into max_tokens 16 with 4 kept for the answer"]


def test_a_neighbours_budget_changes_nothing(client: openai.OpenAI) -> None:
    knobs = [{}, {"thinking_budget": 3}, {"think": False}, {"thinking_budget": 9}] * 4
    alone = [chat(client, knob) for knob in knobs[:4]] * 4
    with ThreadPoolExecutor(len(knobs)) as pool:
        assert list(pool.map(lambda knob: chat(client, knob), knobs)) == alone


def responses(client: openai.OpenAI, **options: Any) -> tuple[str, str, int]:
    reply: Any = client.responses.create(model=MODEL, input=QUESTION, temperature=0, **options)
    texts = {item.type: "".join(part.text for part in item.content) for item in reply.output}
    return texts.get("reasoning", ""), texts["message"], reply.usage.output_tokens_details.reasoning_tokens


def test_the_responses_api_has_the_same_dial(client: openai.OpenAI) -> None:
    free = chat(client, {})
    assert responses(client) == responses(client, reasoning={"effort": "low"}) == free
    assert responses(client, reasoning={"effort": "none"}) == chat(client, {"think": False})
    assert responses(client, extra_body={"reasoning": {"max_tokens": 8}}) == chat(client, {"thinking_budget": 8})
    hidden = {"reasoning": {"exclude": True}}
    assert responses(client, extra_body=hidden) == ("", *free[1:])
    schema: Any = {"format": {"type": "json_schema", "name": "answer", "schema": {"type": "integer"}}}
    assert responses(client, text=schema, extra_body=hidden) == ("", *free[1:])
    streamed = ""
    for event in client.responses.create(
        model=MODEL, input=QUESTION, temperature=0, stream=True, extra_body={"thinking_token_budget": 8}
    ):
        streamed += event.delta if event.type == "response.reasoning_text.delta" else ""
    assert streamed == free[0][:8]


def claude_says(claude: anthropic.Anthropic, knob: dict[str, Any] | None = None, **options: Any) -> tuple[str, str]:
    messages: Any = CHAT
    extra = {"temperature": 0, **(knob or {})}  # the client's own argument for it is gone
    reply: Any = claude.messages.create(model=MODEL, max_tokens=200, messages=messages, extra_body=extra, **options)
    texts = {block.type: getattr(block, block.type) for block in reply.content}
    return texts.get("thinking", ""), texts["text"]


def test_the_messages_api_has_the_same_dial(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    free = chat(client, {})[:2]
    assert claude_says(claude) == free
    assert claude_says(claude, thinking={"type": "adaptive"}) == free
    assert claude_says(claude, thinking={"type": "between_tools"}) == free
    assert claude_says(claude, thinking={"type": "disabled"}) == chat(client, {"think": False})[:2]
    # Anthropic's own floor of 1024 is for its models; a small budget is as good here.
    assert (
        claude_says(claude, thinking={"type": "enabled", "budget_tokens": 8})
        == chat(client, {"thinking_budget": 8})[:2]
    )
    messages: Any = CHAT
    with claude.messages.stream(
        model=MODEL, max_tokens=200, messages=messages, extra_body={"thinking_budget": 8, "temperature": 0}
    ) as stream:
        thought = "".join(event.thinking for event in stream if event.type == "thinking")
    assert thought == free[0][:8]


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"think": True, "reasoning_effort": "none"}, "contradicts"),
        ({"thinking_tokens": 8}, "`thinking_tokens`: found an unknown reasoning field"),
        ({"thinking_budget": "8"}, "`thinking_budget`: found '8', allowed: an integer"),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, "template has no such rule"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_on_every_api(
    client: openai.OpenAI, claude: anthropic.Anthropic, knob: dict[str, Any], message: str
) -> None:
    for call in (lambda: chat(client, knob), lambda: responses(client, extra_body=knob)):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert message in str(caught.value)
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude_says(claude, knob)
    assert message in str(refused.value)
