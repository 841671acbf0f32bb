"""gpt-oss behind two real servers, stock and ours, with Harmony's own vocabulary: what off, levels and budgets do.

Neither server is told a reasoning parser: vLLM chooses gpt-oss's by itself. The scripted model says the level that its
prompt asks for, so that an answer tells what was rendered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harmony_model
import httpx
import pytest
import server
from harmony_model import THOUGHT, WORDS

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, str(Path(__file__).with_name("scripted_server.py"))]
# One request at a time, as the model remembers one.
FLAGS = ("--served-model-name", "oss", "--max-num-seqs", "1", "--no-enable-prefix-caching",
         "--enable-auto-tool-choice", "--tool-call-parser", "openai")  # fmt: skip
KINDS = ("ours", "stock")
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
# Of the published o200k_base.tiktoken, which openai_harmony checks too.
PUBLISHED_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
SHORT = 512
NOTE = f"off: gpt-oss always reasons; hidden, level low, at most {SHORT} tokens"
NUM_ANSWER = len("XYZ") + 2  # the level, and the end token
NUMBER = {"type": "integer", "minimum": 10, "maximum": 99}
SCHEMA = {
    CHAT: {"response_format": {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER}}},
    RESPONSES: {"text": {"format": {"type": "json_schema", "name": "number", "schema": NUMBER}}},
}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
TOOLS = {
    CHAT: {"tools": [{"type": "function", "function": ADD}]},
    RESPONSES: {"tools": [{"type": "function", **ADD}]},
}
MOST = {CHAT: "max_tokens", RESPONSES: "max_output_tokens"}


@dataclass
class Reply:
    """What a client sees of a reply, whole or streamed. `raw`: all that the server sent."""

    raw: str
    thought: str = ""
    answer: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_thinking(self) -> int:
        details = self.usage.get("completion_tokens_details") or self.usage.get("output_tokens_details") or {}
        count: int = details["reasoning_tokens"]
        return count


def post(client: httpx.Client, path: str, asked: str, is_streamed: bool = False, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"model": "oss", "temperature": 0, "stream": is_streamed, **fields}
    body |= {"input": asked} if path == RESPONSES else {"messages": [{"role": "user", "content": asked}]}
    if is_streamed and path == CHAT:
        body["stream_options"] = {"include_usage": True}
    return client.post(path, json=body)


def ask(client: httpx.Client, path: str, asked: str, is_streamed: bool = False, **fields: Any) -> Reply:
    sent = post(client, path, asked, is_streamed, **fields)
    assert sent.status_code == 200, sent.text
    parts = list(events(sent.text)) if is_streamed else [sent.json()]
    return (read_response if path == RESPONSES else read_chat)(Reply(sent.text), parts)


def events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def read_chat(reply: Reply, parts: list[dict[str, Any]]) -> Reply:
    for part in parts:
        reply.usage, reply.info = part.get("usage") or reply.usage, part.get("reasoning_info") or reply.info
        for choice in part["choices"]:
            said = choice.get("message") or choice.get("delta") or {}
            assert said.get("reasoning") == said.get("reasoning_content", said.get("reasoning"))
            reply.thought += said.get("reasoning") or ""
            reply.answer += said.get("content") or ""
            for call in said.get("tool_calls") or ():
                name, arguments = call["function"].get("name"), call["function"].get("arguments") or ""
                reply.calls += [(name, "")] if name else []
                reply.calls[-1] = (reply.calls[-1][0], reply.calls[-1][1] + arguments)
    return reply


def read_response(reply: Reply, parts: list[dict[str, Any]]) -> Reply:
    done = parts[-1].get("response", parts[-1])
    for item in done["output"]:
        texts = [part["text"] for part in item.get("content") or ()]
        if item["type"] == "function_call":
            reply.calls.append((item["name"], item["arguments"]))
        elif item["type"] == "reasoning":
            reply.thought += "\n" * bool(reply.thought) + "".join(texts)
        else:
            reply.answer += "\n" * bool(reply.answer) + "".join(texts)
    streamed = [part for part in parts if part.get("type") == "response.output_text.delta"]
    assert not streamed or "".join(part["delta"] for part in streamed) == reply.answer.replace("\n", "")
    reply.usage, reply.info = done["usage"], done.get("reasoning_info", {})
    return reply


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, httpx.Client]]:
    """Both servers, started at once."""
    folder = tmp_path_factory.mktemp("harmony")
    arguments = (str(harmony_model.write_model(folder / "model")), *FLAGS)
    with ExitStack() as stack:

        def start(kind: str) -> httpx.Client:
            running = server.running(folder / f"{kind}.txt", *arguments, program=[*PROGRAM, kind])
            return stack.enter_context(httpx.Client(base_url=stack.enter_context(running), timeout=60))

        with ThreadPoolExecutor() as pool:
            started = dict(zip(KINDS, pool.map(start, KINDS), strict=True))
        yield started


@pytest.fixture
def ours(clients: dict[str, httpx.Client]) -> httpx.Client:
    return clients["ours"]


@pytest.fixture
def stock(clients: dict[str, httpx.Client]) -> httpx.Client:
    """vLLM without our plugin."""
    return clients["stock"]


def test_the_vocabulary_is_harmonys_own() -> None:
    lines = (b"%s %d\n" % (base64.b64encode(word), token) for token, word in enumerate(harmony_model.words()))
    assert hashlib.sha256(b"".join(lines)).hexdigest() == PUBLISHED_SHA256


# --- off -----------------------------------------------------------------------------------------------------------

BY_EFFORT = {CHAT: {"reasoning_effort": "none"}, RESPONSES: {"reasoning": {"effort": "none"}}}
OFF = [
    *BY_EFFORT.items(),
    *((path, fields) for path in (CHAT, RESPONSES) for fields in ({"reasoning": {"enabled": False}}, {"think": False})),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "fields"), OFF)
def test_off_is_short_hidden_reasoning_and_the_reply_says_so(
    ours: httpx.Client, path: str, fields: dict[str, Any], is_streamed: bool
) -> None:
    reply = ask(ours, path, "plain", is_streamed, **fields)
    assert (reply.answer, reply.thought) == ("X Y Z low", "")
    assert not any(piece in reply.raw for piece in (THOUGHT, '" a"', "analysis", "response.reasoning_"))
    info = reply.info
    assert info["requested"]["mode"] == "off" and info["notes"] == [NOTE]
    assert info["effective"] == {"mode": "on", "effort": "low", "budget": SHORT}
    assert (info["thinking_tokens"], info["answer_tokens"], info["end_reason"]) == (7, NUM_ANSWER, "natural")
    assert 0 < info["time_to_first_thinking_ms"] < info["time_to_first_answer_ms"]
    assert reply.num_thinking == 7


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_hidden_reasoning_is_short_and_leaves_room_for_the_answer(ours: httpx.Client, path: str) -> None:
    reply = ask(ours, path, "endless", **BY_EFFORT[path])
    assert (reply.answer, reply.num_thinking, reply.info["end_reason"]) == ("X Y Z low", SHORT, "budget")
    reply = ask(ours, path, "endless", **BY_EFFORT[path], **{MOST[path]: 60})
    # 15 of 60 stay for the answer, and the forced end takes 5.
    assert (reply.answer, reply.num_thinking) == ("X Y Z low", 40)
    assert reply.info["notes"] == [NOTE, "budget 512: 40 fit into max_tokens 60 with 15 kept for the answer"]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 8, 9, 11])
def test_a_hidden_thought_that_is_all_there_is_room_for_shows_no_markup(ours: httpx.Client, most: int) -> None:
    for is_streamed in (False, True):
        reply = ask(ours, CHAT, "plain", is_streamed, **BY_EFFORT[CHAT], max_tokens=most)
        assert (reply.answer, reply.thought) == ("", "")
        assert reply.num_thinking == reply.info["thinking_tokens"] <= reply.info["effective"]["budget"]
        assert reply.info["end_reason"] == ("budget" if most > 2 else None)


def test_stock_vllm_knows_no_off_for_gpt_oss_and_ignores_other_words_for_it(stock: httpx.Client) -> None:
    for path in (CHAT, RESPONSES):
        refused = post(stock, path, "plain", **BY_EFFORT[path])
        assert refused.status_code == 400 and "Harmony" in refused.json()["error"]["message"]
        ignored = ask(stock, path, "plain", think=False)
        assert (ignored.thought, ignored.answer) == (THOUGHT, "X Y Z medium")
    assert "<|channel|>" in ask(stock, CHAT, "plain", max_tokens=2).answer


# --- levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize(("effort", "level"), [(None, None), ("low", "low"), ("medium", "medium"), ("high", "high"),
                                               ("minimal", "low"), ("max", "high")])  # fmt: skip
def test_a_level_reaches_the_prompt(
    ours: httpx.Client, path: str, effort: str | None, level: str | None, is_streamed: bool
) -> None:
    fields = {} if effort is None else {"reasoning": {"effort": effort}}
    reply = ask(ours, path, "plain", is_streamed, **fields)
    assert (reply.thought, reply.answer) == (THOUGHT, f"X Y Z {level or 'medium'}")
    assert reply.info["effective"] == {"mode": effort and "on", "effort": level, "budget": None}
    assert reply.info.get("notes") == (None if effort == level else [f"effort {effort}: nearest level is {level}"])
    assert reply.num_thinking == 7


def test_stock_vllm_refuses_every_other_word_for_a_level(stock: httpx.Client) -> None:
    for fields in ({"reasoning_effort": "minimal"}, {"reasoning_effort": "max"}):
        assert post(stock, CHAT, "plain", **fields).status_code == 400
    assert post(stock, RESPONSES, "plain", reasoning={"effort": "minimal"}).status_code == 400


# --- budgets -------------------------------------------------------------------------------------------------------

BUDGETS = [
    (CHAT, lambda budget: {"thinking_token_budget": budget}),
    (CHAT, lambda budget: {"thinking": {"type": "enabled", "budget_tokens": budget}}),
    (RESPONSES, lambda budget: {"reasoning": {"max_tokens": budget}}),
]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("path", "fields"), BUDGETS)
def test_a_budget_is_exact_and_the_final_channel_is_answered(
    ours: httpx.Client, path: str, fields: Any, is_streamed: bool
) -> None:
    for budget, num_thought in ((1, 1), (2, 2), (6, 6), (7, 7), (8, 7), (1000, 7), (-1, 7)):
        reply = ask(ours, path, "plain", is_streamed, **fields(budget))
        assert (reply.thought, reply.answer) == ("".join(WORDS[:num_thought]), "X Y Z medium")
        info, is_cut = reply.info, 0 < budget <= 7
        assert reply.num_thinking == info["thinking_tokens"] == num_thought
        assert (info["end_reason"], info["answer_tokens"]) == ("budget" if is_cut else "natural", NUM_ANSWER)
    # It is one budget for all thoughts of a reply.
    reply = ask(ours, path, "twice", is_streamed, **fields(9))
    assert (reply.thought, reply.answer) == (f"{THOUGHT}\n{''.join(WORDS[:2])}", "X Y Z medium")
    assert (reply.num_thinking, reply.info["answer_tokens"]) == (9, NUM_ANSWER)


def test_stock_vllm_has_no_budget_for_gpt_oss(stock: httpx.Client) -> None:
    refused = post(stock, CHAT, "plain", thinking_token_budget=3)
    assert refused.status_code == 400 and "reasoning_config" in refused.json()["error"]["message"]
    assert ask(stock, RESPONSES, "plain", thinking_token_budget=3).thought == THOUGHT


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_schema_is_answered_after_a_cut_thought(ours: httpx.Client, path: str) -> None:
    """Harmony's header names the format then, and a grammar that meets another header is a 500 in vLLM."""
    for fields, num_thinking in (({"thinking_token_budget": 5}, 5), ({**BY_EFFORT[path], MOST[path]: 60}, 40)):
        reply = ask(ours, path, "number", **SCHEMA[path], **fields)
        assert (reply.answer, reply.num_thinking) == ("42", num_thinking)
        assert reply.info["end_reason"] == "budget"
    assert ask(ours, path, "number", **TOOLS[path], thinking_token_budget=5).answer == "42"


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_required_tool_is_called_after_a_cut_thought(ours: httpx.Client, path: str) -> None:
    for budget, num_thinking in ((3, 3), (8, 7)):
        reply = ask(ours, path, "call", **TOOLS[path], tool_choice="required", thinking_token_budget=budget)
        assert (reply.calls, reply.num_thinking) == ([("add", '{"a": 1}')], num_thinking)


# --- the reply -----------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_text(ours: httpx.Client, stock: httpx.Client) -> None:
    expected = {
        "plain": (THOUGHT, "X Y Z medium", []),
        "twice": (f"{THOUGHT}\n{THOUGHT}", "X Y Z medium", []),
        "at once": ("", "X Y Z medium", []),
        "preamble": (THOUGHT, "X Y\nX Y Z medium", []),
        "call": (THOUGHT, "", [("add", '{"a": 1}')]),
    }
    for path in (CHAT, RESPONSES):
        for asked, texts in expected.items():
            for is_streamed in (False, True):
                reply = ask(ours, path, asked, is_streamed, **TOOLS[path])
                assert (reply.thought, reply.answer, reply.calls) == texts
    assert ask(stock, CHAT, "twice", True).thought == THOUGHT * 2


def test_a_tool_calls_arguments_are_no_thought(ours: httpx.Client, stock: httpx.Client) -> None:
    counts = [ask(client, CHAT, "call", **TOOLS[CHAT]).num_thinking for client in (ours, stock)]
    assert counts == [7, 7 + len(harmony_model.encode('{"a": 1}'))], "stock vLLM has mended it"


def test_a_reply_without_a_thought_has_none(ours: httpx.Client) -> None:
    info = ask(ours, CHAT, "at once").info
    assert (info["thinking_tokens"], info["answer_tokens"], info["end_reason"]) == (0, NUM_ANSWER, None)
    assert info["time_to_first_thinking_ms"] is None


def test_the_list_of_models_tells_that_it_cannot_be_switched_off(ours: httpx.Client) -> None:
    (listed,) = ours.get("/v1/models").json()["data"]
    found = listed["reasoning"]
    assert (found["profile"], found["can_disable"], found["modes"]) == ("gpt-oss", False, ["on", "off"])
    assert found["off"] == "short hidden reasoning, as the model always reasons"
    assert [each["effort"] for each in found["efforts"]] == ["low", "medium", "high"]
    assert found["budget"] == {"min": 0, "max": None}
    assert found["default"] == {"mode": "on", "effort": "medium", "budget": None}
