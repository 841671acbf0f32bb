"""What replies say of their reasoning, on three APIs, whole and streamed; the middleware's way of sending them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest
from vllm_puzzle.serving.dial.middleware import ReplySender
from vllm_puzzle.serving.dial.reply import finish_body, finish_event
from vllm_puzzle.serving.dial.request import ReasoningRequest
from vllm_puzzle.serving.dial.resolve import Effective
from vllm_puzzle.serving.dial.turn import Turn

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@dataclass
class Known:
    num_thinking: int = 3
    num_answer: int = 2
    first_thinking: float | None = 0.25
    first_answer: float | None = 0.5
    end_reason: str | None = "budget"

    def thinking_tokens_at(self, num_tokens: int) -> int:
        return min(num_tokens, self.num_thinking)


def turn(path: str = CHAT, is_visible: bool = True, reports: tuple[Known, ...] = (Known(),)) -> Turn:
    wish = ReasoningRequest(is_on=True, budget=9)
    effective = Effective(is_on=True, budget=3, is_visible=is_visible)
    return Turn(path, wish, effective=effective, is_counted=True, sources=[dict(enumerate(reports))])


def event(**chunk: Any) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def finished(raw: str, of: Turn) -> Any:
    text = finish_event(raw, of)
    assert text is not None and text.endswith("\n\n")
    return json.loads(text.partition("data: ")[2])


INFO = {
    "requested": {"mode": "on", "effort": None, "budget": 9},
    "effective": {"mode": "on", "effort": None, "budget": 3},
    "thinking_tokens": 3,
    "answer_tokens": 2,
    "end_reason": "budget",
    "time_to_first_thinking_ms": 250.0,
    "time_to_first_answer_ms": 500.0,
}


def test_a_chat_reply_tells_text_count_and_what_happened() -> None:
    body = {"choices": [{"message": {"content": "4", "reasoning": "1+3"}}], "usage": {"completion_tokens": 6}}
    finish_body(body, turn())
    assert body["choices"][0]["message"] == {"content": "4", "reasoning": "1+3", "reasoning_content": "1+3"}
    assert body["usage"] == {"completion_tokens": 6, "completion_tokens_details": {"reasoning_tokens": 3}}
    assert body["reasoning_info"] == INFO


@pytest.mark.parametrize("names", [("reasoning",), ("reasoning_content",), ("reasoning", "reasoning_content")])
def test_the_names_of_a_thought_are_the_operators_choice(names: tuple[str, ...]) -> None:
    of = turn()
    of.names = names
    body = {"choices": [{"message": {"content": "4", "reasoning": "1+3"}}]}
    finish_body(body, of)
    assert body["choices"][0]["message"] == {"content": "4", **dict.fromkeys(names, "1+3")}
    chunk = event(choices=[{"delta": {"reasoning": "1+3"}}])
    assert finished(chunk, of)["choices"][0]["delta"] == dict.fromkeys(names, "1+3")


def test_a_hidden_thought_is_in_no_field_of_the_reply() -> None:
    logprobs = {"content": [{"token": "1"}]}
    choice = {"message": {"content": "4", "reasoning": "1+3"}, "logprobs": logprobs, "token_ids": [1]}
    body: Any = {"choices": [choice]}
    finish_body(body, turn(is_visible=False))
    assert "1" not in json.dumps(body["choices"])
    assert body["reasoning_info"] == INFO


def test_a_server_that_cannot_count_says_null() -> None:
    body: Any = {"choices": [{"message": {"content": "4"}}], "usage": {"completion_tokens": 6}}
    finish_body(body, Turn(CHAT))
    assert body["usage"] == {"completion_tokens": 6}
    assert body["reasoning_info"]["thinking_tokens"] is body["reasoning_info"]["end_reason"] is None


def test_several_sequences_are_told_apart() -> None:
    body: Any = {"choices": [], "usage": {}}
    finish_body(body, turn(reports=(Known(), Known(num_thinking=5, end_reason="natural"))))
    info = body["reasoning_info"]
    assert info["thinking_tokens"] == body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8
    assert [choice["end_reason"] for choice in info["choices"]] == ["budget", "natural"]
    assert info["end_reason"] is None


def test_an_event_with_a_thought_names_it_twice_and_a_hidden_one_vanishes() -> None:
    thought = event(choices=[{"index": 0, "delta": {"reasoning": "é1"}, "finish_reason": None}])
    assert finished(thought, turn())["choices"][0]["delta"] == {"reasoning": "é1", "reasoning_content": "é1"}
    hidden = turn(is_visible=False)
    assert finish_event(thought, hidden) is None
    with_usage = event(choices=[{"index": 0, "delta": {"reasoning": "1"}}], usage={"completion_tokens": 1})
    assert finished(with_usage, hidden)["choices"][0]["delta"] == {}
    both = event(choices=[{"index": 0, "delta": {"reasoning": "1", "content": "4"}}])
    assert finished(both, hidden)["choices"][0]["delta"]["content"] == "4"


@pytest.mark.parametrize(("num_tokens", "thinking"), [(0, 0), (2, 2), (5, 3)])
def test_usage_along_the_way_counts_the_tokens_so_far(num_tokens: int, thinking: int) -> None:
    raw = event(choices=[{"index": 0, "delta": {"content": ""}}], usage={"completion_tokens": num_tokens})
    assert finished(raw, turn())["usage"]["completion_tokens_details"] == {"reasoning_tokens": thinking}


def test_the_last_chunks_of_a_stream_tell_what_happened() -> None:
    last = '{"choices":[{"index":0,"delta":{"content":"4"},"finish_reason":"stop"}]}'
    assert finished(f"data: {last}\n\n", turn())["reasoning_info"] == INFO
    usage = finished(event(choices=[], usage={"completion_tokens": 6}), turn())
    assert usage["reasoning_info"] == INFO
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize("is_visible", [True, False])
@pytest.mark.parametrize(
    "raw",
    [
        "data: [DONE]\n\n",
        'data: {"reasoning": \n\n',
        'data: ["reasoning"]\n\n',
        event(choices=[{"delta": {"content": "reasoning"}}]),
        ": keep-alive\n\n",
    ],
)
def test_other_events_pass_byte_for_byte(raw: str, is_visible: bool) -> None:
    assert finish_event(raw, turn(is_visible=is_visible)) == raw


def test_a_responses_reply_tells_count_and_what_happened() -> None:
    item = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "1+3"}], "summary": []}
    body: Any = {"output": [item], "usage": {"output_tokens_details": {"reasoning_tokens": 0, "tool": 1}}}
    finish_body(body, turn(RESPONSES))
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 3, "tool": 1}
    assert body["reasoning_info"] == INFO
    assert body["output"][0]["content"]
    finish_body(body, turn(RESPONSES, is_visible=False))
    assert body["output"][0]["content"] == []


@pytest.mark.parametrize(
    ("fields", "is_kept"),
    [
        ({"type": "response.reasoning_text.delta", "delta": "1"}, False),
        ({"type": "response.reasoning_part.added", "part": {"type": "reasoning_text", "text": ""}}, False),
        ({"type": "response.content_part.done", "part": {"type": "reasoning_text", "text": "1"}}, False),
        ({"type": "response.output_text.delta", "delta": "4"}, True),
        ({"type": "response.output_item.done", "item": {"type": "reasoning", "content": [{"text": "1"}]}}, True),
    ],
)
def test_a_responses_stream_hides_each_event_of_a_thought(fields: dict[str, Any], is_kept: bool) -> None:
    raw = f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n"
    assert finish_event(raw, turn(RESPONSES)) is not None
    text = finish_event(raw, turn(RESPONSES, is_visible=False))
    assert (text is not None) == is_kept
    assert '"1"' not in (text or "")


def test_a_responses_stream_ends_with_what_happened() -> None:
    fields = {"type": "response.completed", "response": {"output": [], "usage": {}}}
    raw = f"event: response.completed\ndata: {json.dumps(fields)}\n\n"
    assert finished(raw, turn(RESPONSES))["response"]["reasoning_info"] == INFO
    text = finish_event(raw, turn(RESPONSES))
    assert text is not None and text.startswith("event: response.completed\ndata: ")


def test_a_messages_reply_counts_thinking_and_an_omitted_thought_keeps_its_signature() -> None:
    block = {"type": "thinking", "thinking": "1+3", "signature": "s"}
    body: Any = {"content": [dict(block)], "usage": {"output_tokens": 6}}
    finish_body(body, turn(MESSAGES, is_visible=False))
    assert body["content"] == [{**block, "thinking": ""}]
    assert body["usage"]["output_tokens_details"] == {"thinking_tokens": 3}
    assert body["reasoning_info"] == INFO


def test_a_messages_stream_does_the_same() -> None:
    delta = {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "1"}}
    raw = f"event: content_block_delta\ndata: {json.dumps(delta)}\n\n"
    assert finish_event(raw, turn(MESSAGES)) is not None
    assert finish_event(raw, turn(MESSAGES, is_visible=False)) is None
    signature = raw.replace("thinking_delta", "signature_delta")
    assert finish_event(signature, turn(MESSAGES, is_visible=False)) is not None
    last = f"event: message_delta\ndata: {json.dumps({'type': 'message_delta', 'usage': {'output_tokens': 6}})}\n\n"
    assert finished(last, turn(MESSAGES))["usage"]["output_tokens_details"] == {"thinking_tokens": 3}


def send_all(messages: list[dict[str, Any]], of: Turn) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        sender = ReplySender(of, send)
        for message in messages:
            await sender(message)

    asyncio.run(run())
    return sent


def start(kind: bytes, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), (b"x-id", b"7")]}


def body(raw: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": raw, "more_body": more}


def test_a_whole_reply_in_pieces_goes_out_finished_with_its_new_length() -> None:
    raw = json.dumps({"choices": [{"message": {"reasoning": "é"}}]}).encode()
    head, sent = send_all([start(b"application/json"), body(raw[:9], True), body(raw[9:])], turn())
    assert json.loads(sent["body"])["choices"][0]["message"]["reasoning_content"] == "é"
    assert dict(head["headers"]) == {
        b"content-type": b"application/json",
        b"x-id": b"7",
        b"content-length": str(len(sent["body"])).encode(),
    }


def test_an_event_cut_between_messages_is_finished_when_it_is_whole() -> None:
    chunk = {"choices": [{"delta": {"reasoning": "é"}}]}
    raw = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
    cut = raw.index("é".encode()) + 1  # in the middle of a character
    messages = [start(b"text/event-stream; charset=utf-8"), body(raw[:cut], True), body(raw[cut:], True), body(b"")]
    sent = send_all(messages, turn())
    text = b"".join(message["body"] for message in sent[1:]).decode()
    assert json.loads(text.removeprefix("data: "))["choices"][0]["delta"]["reasoning_content"] == "é"
    assert [message["more_body"] for message in sent[1:]] == [True, False]


@pytest.mark.parametrize(
    ("head", "raw"),
    [(start(b"application/json", 400), b'{"error": {"reasoning": 1}}'), (start(b"text/plain"), b'{"reasoning": 1}')],
)
def test_errors_and_other_types_pass_byte_for_byte(head: dict[str, Any], raw: bytes) -> None:
    sent_head, sent = send_all([head, body(raw)], turn())
    assert (sent_head["status"], sent["body"]) == (head["status"], raw)


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", "/v1/messages"])
def test_an_error_of_the_web_framework_gets_the_shape_of_its_api(path: str) -> None:
    for raw in (b'{"detail": "no"}', b'{"error": {"message": "no", "type": "t", "param": null, "code": 400}}'):
        _, sent = send_all([start(b"application/json", 400), body(raw)], Turn(path))
        error = json.loads(sent["body"])
        assert error["error"]["message"] == "no"
        assert set(error["error"]) == (
            {"type", "message"} if path == "/v1/messages" else {"message", "type", "param", "code"}
        )
        assert error.get("type") == ("error" if path == "/v1/messages" else None)


def test_json_that_is_no_object_passes_byte_for_byte() -> None:
    assert send_all([start(b"application/json"), body(b"[1]")], turn())[1]["body"] == b"[1]"
