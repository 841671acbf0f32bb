"""A reply is read alike whole and streamed, for each parser that reads `<think>`; stock vLLM's differs, as shown."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import scripted_model
from scripted_model import SHUT, THINK, encode
from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving.consistent_parser import consistent, this_turn

PARSERS = ("nemotron_v3", "qwen3", "deepseek_r1")
MARKERS = ThinkingMarkers((THINK,), ((SHUT,),), (SHUT,))
HISTORY = "<|user|>hi<|end|><|assistant|><think></think>old<|end|><|user|>more<|end|><|assistant|>"
# What the prompt ends with → whether the reply begins inside the thought.
PROMPTS = {
    "opened": ("<|user|>hi<|end|><|assistant|><think>", True),
    "closed": ("<|user|>hi<|end|><|assistant|><think></think>", False),
    "closed and a line": ("<|user|>hi<|end|><|assistant|><think>\n\n</think>\n\n", False),
    "closed and an answer begun": ("<|user|>hi<|end|><|assistant|><think></think>The", False),
    "opened after an earlier turn": (HISTORY + "<think>", True),
    "closed after an earlier turn": (HISTORY + "<think></think>", False),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(scripted_model.write_model(tmp_path_factory.mktemp("scripted")))


@cache
def stock(name: str, tools: str | None = None) -> Any:
    from vllm.parser import ParserManager

    return ParserManager.get_parser(reasoning_parser_name=name, tool_parser_name=tools, enable_auto_tools=bool(tools))


def ask(tools: list[Any] | None = None) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    choice = {"tools": tools, "tool_choice": "auto"} if tools else {}
    return ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **choice})


def whole(parser_cls: Any, tokenizer: Any, prompt: str, reply: str, request: Any = None) -> tuple[str, str, list[Any]]:
    request = request or ask()
    parser = parser_cls(tokenizer, request.tools)
    parser.set_prompt_token_ids(encode(prompt))
    thought, answer, calls = parser.parse(reply, request, bool(request.tools), encode(reply))
    return thought or "", answer or "", [(call.name, call.arguments) for call in calls or ()]


def streamed(parser_cls: Any, tokenizer: Any, prompt: str, reply: str, step: int) -> tuple[str, str, list[Any]]:
    request, ids = ask(), encode(reply)
    parser, thought, answer = parser_cls(tokenizer, None), "", ""
    for at in range(0, len(ids), step):
        part = ids[at : at + step]
        delta = parser.parse_delta(
            scripted_model.decode(part), part, request, encode(prompt), finished=at + step >= len(ids)
        )
        thought += (delta and delta.reasoning) or ""
        answer += (delta and delta.content) or ""
    return thought, answer, []


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", PARSERS)
def test_defect_2_4_a_stream_is_the_same_text(tokenizer: Any, name: str, step: int, prompt: str) -> None:
    text, is_open = PROMPTS[prompt]
    ours = consistent(stock(name), MARKERS, tokenizer)
    reply = "abc</think>XYZ" if is_open else "XYZ"
    expected: tuple[str, str, list[Any]] = ("abc", "XYZ", []) if is_open else ("", "XYZ", [])
    assert whole(ours, tokenizer, text, reply) == expected
    assert streamed(ours, tokenizer, text, reply, step) == expected
    # Stock vLLM: the answer as the thought when the reply is whole.
    assert whole(stock(name), tokenizer, text, reply) == (expected if is_open else ("XYZ", "", []))


@pytest.mark.parametrize("name", PARSERS)
def test_defect_2_4_a_second_end_marker_is_the_same_in_a_stream(tokenizer: Any, name: str) -> None:
    prompt, reply = PROMPTS["opened"][0], "abc</think>X</think>Y"
    ours = consistent(stock(name), MARKERS, tokenizer)
    # deepseek_r1 leaves it in the answer, both ways.
    answer = "X</think>Y" if name == "deepseek_r1" else "XY"
    assert whole(ours, tokenizer, prompt, reply) == streamed(ours, tokenizer, prompt, reply, 1) == ("abc", answer, [])
    assert streamed(stock(name), tokenizer, prompt, reply, 1) == ("abc", "X</think>Y", [])


@pytest.mark.parametrize("name", PARSERS)
def test_defect_2_5_an_earlier_turns_end_is_not_this_turns(tokenizer: Any, name: str) -> None:
    ours = consistent(stock(name), MARKERS, tokenizer)
    for end, is_over in (("", False), ("<think>", False), ("<think></think>", True), ("<think></think>The", True)):
        assert ours(tokenizer, None).is_reasoning_end(encode(HISTORY + end)) == is_over
    # Stock vLLM knows the turns of ChatML alone, which these are not.
    assert stock(name)(tokenizer, None).is_reasoning_end(encode(HISTORY))
    reply = "<think>abc</think>XYZ"
    assert whole(ours, tokenizer, HISTORY, reply) == streamed(ours, tokenizer, HISTORY, reply, 1) == ("abc", "XYZ", [])


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("name", PARSERS)
def test_a_tool_call_after_a_thought_closed_by_the_prompt_is_one(tokenizer: Any, name: str) -> None:
    ours = consistent(stock(name, "hermes"), MARKERS, tokenizer)
    request = ask(TOOLS)
    assert whole(ours, tokenizer, PROMPTS["closed"][0], CALL, request) == ("", "", [("add", '{"a": 1}')])
    assert whole(ours, tokenizer, PROMPTS["opened"][0], "abc</think>" + CALL, request)[::2] == (
        "abc",
        [("add", '{"a": 1}')],
    )


def test_a_parser_that_is_no_pair_or_a_server_without_markers_keeps_its_own(tokenizer: Any) -> None:
    from vllm.parser.abstract_parser import Parser

    assert consistent(None, MARKERS, tokenizer) is None
    assert consistent(Parser, MARKERS, tokenizer) is Parser
    assert consistent(stock("qwen3"), None, tokenizer) is stock("qwen3")


def test_a_turn_begins_after_its_last_boundary_if_the_thought_was_closed_before() -> None:
    boundaries = frozenset({7})
    for prompt, turn in (
        ([THINK, SHUT, 1, 7, 2], [2]),
        ([THINK, SHUT, 1, 7], []),
        ([7, THINK, SHUT, 1], [7, THINK, SHUT, 1]),
        ([THINK, SHUT, 7, THINK], [THINK, SHUT, 7, THINK]),
        ([3, 4], [3, 4]),
    ):
        assert this_turn(MARKERS, boundaries, prompt) == turn
