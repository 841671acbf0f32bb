"""A scripted model behind two real servers, stock and ours: what stock vLLM 0.32 gets wrong, and our control route.

Every `test_defect_2_x` asserts the defect on the stock server first, so that it tells when upstream has mended it. Both
servers run the parser deepseek_r1, which counts no thought that the prompt opens.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import scripted_model
import server
from scripted_model import BAND, BANDS

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, str(Path(__file__).with_name("scripted_server.py"))]
FLAGS = ("--reasoning-parser", "deepseek_r1", "--served-model-name", "scripted", "--enable-per-request-metrics")
KEYS = ("one", "two")
# An operator's decisions; vLLM has no flag for any of them.
LOW, CEILING = 20, 2500
POLICY = tuple(
    f"--puzzle-reasoning.{key}"
    for key in (f"budgets.low={LOW}", f"ceiling={CEILING}", "answer_reserve=4", "grace.share=0.4")
)
CHAT, RESPONSES, MESSAGES, CONTROL = (
    f"/v1/{name}" for name in ("chat/completions", "responses", "messages", "chat/completions/control")
)
NUMBER = {"type": "integer", "minimum": 10, "maximum": 99}
SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER}}}
TEXT = {"type": "json_schema", "name": "number", "schema": NUMBER}
LOOPS = {"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 2, "min_count": 3}}
LONG = {"max_tokens": 3000}


def said(*texts: str) -> dict[str, Any]:
    """A conversation; a last text that ends with "!" gets a closed thought from the template, "?" no thought."""
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


def in_band(script: str) -> dict[str, Any]:
    """A message so long that the reply follows this script."""
    return said("." * (BAND * BANDS[script]))


def reply(*kinds: str) -> dict[str, Any]:
    """An earlier reply in a Responses input, with parts of these kinds."""
    keys = {"output_text": {"text": "X", "annotations": []}, "refusal": {"refusal": "No."}}
    parts = [{"type": kind, **keys[kind]} for kind in kinds]
    return {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": parts}


ASKED = {"role": "user", "content": "hi"}
OMITTED = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
HISTORY = ("hi", "old", "more?")
# name → (path, body): sent to both servers.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (CHAT, said("hi")),
    "stream": (CHAT, {**said("hi"), "stream": True, "stream_options": {"include_usage": True}}),
    "budget": (CHAT, {**said("hi"), "thinking_token_budget": 3}),
    "another's field": (CHAT, {**said("hi"), "thinking_budget": 3}),
    "no such variable": (CHAT, {**said("hi"), "chat_template_kwargs": {"preserve_thinking": True}}),
    "closed": (CHAT, said("hi!")),
    "closed, streamed": (CHAT, {**said("hi!"), "stream": True}),
    "closed, responses": (RESPONSES, {"input": "hi!"}),
    "hidden, schema": (CHAT, {**said("hi"), **SCHEMA, "include_reasoning": False}),
    "history, schema": (CHAT, {**said(*HISTORY), **SCHEMA}),
    "history, schema, responses": (
        RESPONSES,
        {"input": said(*HISTORY)["messages"], "text": {"format": TEXT}},
    ),
    "omitted": (MESSAGES, {**said("hi"), "max_tokens": 2000, "thinking": OMITTED}),
    "between tools": (MESSAGES, {**said("hi"), "max_tokens": 99, "thinking": {"type": "between_tools"}}),
    "budget, responses": (RESPONSES, {"input": "hi", "thinking_token_budget": 3}),
    "loop": (CHAT, {**in_band("loop"), **LOOPS, "max_tokens": 60}),
    "level": (CHAT, {**in_band("endless"), "reasoning_effort": "low", "max_tokens": 60}),
    "beyond the ceiling": (CHAT, {**in_band("endless"), "thinking_token_budget": 2900, **LONG}),
    "short": (CHAT, {**said("hi"), "max_tokens": 7}),
    "lines": (CHAT, {**in_band("lines"), "thinking_token_budget": 6}),
    "nulls": (RESPONSES, {"input": "hi", "background": None, "truncation": None}),
    "replies without text": (
        RESPONSES,
        {"input": [*(reply(*parts) for parts in ((), ("refusal",), ("output_text", "output_text"))), ASKED]},
    ),
}  # fmt: skip


def client_of(url: str, key: str = KEYS[0], **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}", **headers}, timeout=60)


def send(client: httpx.Client, name: str) -> tuple[int, Any]:
    """(status, body); of a stream, its chunks."""
    path, body = REQUESTS[name]
    reply = client.post(path, json={"model": "scripted", "temperature": 0, **body})
    return reply.status_code, list(chunks(reply.text.splitlines())) if body.get("stream") else reply.json()


def chunks(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_model.write_model(tmp_path_factory.mktemp("scripted") / "model")


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, tuple[int, Any]]:
    """What vLLM without our plugin replies to each of REQUESTS."""
    arguments = (str(model), *FLAGS, "--api-key", *KEYS)
    log, program = model.parent / "stock.txt", [*PROGRAM, "stock"]
    with server.running(log, *arguments, program=program) as url, client_of(url) as client:
        return {name: send(client, name) for name in REQUESTS}


@pytest.fixture(scope="module")
def url(model: Path, stock: object) -> Iterator[str]:
    """Our server; after the stock one has ended."""
    arguments = (str(model), *FLAGS, *POLICY, "--max-num-seqs", "2", "--api-key", *KEYS)
    with server.running(model.parent / "ours.txt", *arguments, program=[*PROGRAM, "ours"]) as url:
        yield url


@pytest.fixture(scope="module")
def ours(url: str) -> dict[str, tuple[int, Any]]:
    with client_of(url) as client:
        return {name: send(client, name) for name in REQUESTS}


Replies = dict[str, tuple[int, Any]]


def texts(replies: Replies, name: str) -> tuple[str | None, str | None]:
    """(thought, answer) of a chat completion, a response or a stream."""
    status, body = replies[name]
    assert status == 200, body
    if isinstance(body, list):
        deltas = [choice["delta"] for chunk in body for choice in chunk["choices"]]
        thought, answer = ("".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning", "content"))
        return thought or None, answer or None
    if "output" in body:
        found = {item["type"]: item["content"][0]["text"] for item in body["output"]}
        return found.get("reasoning"), found.get("message")
    message = body["choices"][0]["message"]
    return message["reasoning"], message["content"]


def num_thinking(usage: dict[str, Any]) -> int:
    details = usage.get("completion_tokens_details") or usage.get("output_tokens_details")
    count: int = details.get("reasoning_tokens", details.get("thinking_tokens"))
    return count


def test_defect_2_1_a_field_that_nothing_reads_is_an_error(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "another's field") == texts(stock, "no such variable") == ("abcdefg", "XYZ")
    assert texts(ours, "another's field") == ("abc", "XYZ")
    status, body = ours["no such variable"]
    assert (status, body["error"]["param"]) == (400, "chat_template_kwargs.preserve_thinking")


def test_defect_2_2_the_reply_says_that_the_budget_ended_the_thought(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "budget") == texts(ours, "budget") == ("abc", "XYZ")
    assert "reasoning_info" not in stock["budget"][1]
    info = ours["budget"][1]["reasoning_info"]
    assert (info["end_reason"], info["thinking_tokens"], info["effective"]["budget"]) == ("budget", 3, 3)
    assert ours["plain"][1]["reasoning_info"]["end_reason"] == "natural"


def test_defect_2_2_a_level_is_a_budget_where_the_operator_says_so(stock: Replies, ours: Replies) -> None:
    assert len(texts(stock, "level")[0] or "") == 60 and texts(stock, "level")[1] is None
    assert (len(texts(ours, "level")[0] or ""), texts(ours, "level")[1]) == (LOW, "XYZ")


def test_defect_2_2_no_request_thinks_beyond_the_operators_ceiling(stock: Replies, ours: Replies) -> None:
    assert len(texts(stock, "beyond the ceiling")[0] or "") == 2900
    assert (len(texts(ours, "beyond the ceiling")[0] or ""), texts(ours, "beyond the ceiling")[1]) == (CEILING, "XYZ")


def test_defect_2_2_part_of_the_tokens_stays_for_the_answer(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "short") == ("abcdefg", None)
    assert texts(ours, "short") == ("ab", "XYZ")


def test_defect_2_2_a_line_that_ends_shortly_before_the_budget_ends_the_thought(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "lines") == ("abcd\ne", "XYZ")
    assert texts(ours, "lines") == ("abcd\n", "XYZ")


def test_a_reply_without_text_or_of_several_parts_is_history_as_any_other(stock: Replies, ours: Replies) -> None:
    """Found by schemathesis; OpenAI's own API takes them."""
    assert stock["replies without text"][0] == 500
    assert texts(ours, "replies without text") == ("abcdefg", "XYZ")


def test_a_null_where_the_reply_has_a_default_is_the_default(stock: Replies, ours: Replies) -> None:
    """Found by schemathesis."""
    assert stock["nulls"][0] == 400
    assert texts(ours, "nulls") == ("abcdefg", "XYZ")


def test_defect_2_3_thinking_tokens_are_counted_whatever_the_parser_counts(stock: Replies, ours: Replies) -> None:
    for name in ("plain", "budget"):
        assert num_thinking(stock[name][1]["usage"]) == 0
        assert num_thinking(ours[name][1]["usage"]) == len(texts(ours, name)[0] or "")
    (theirs,), (mine,) = (
        [chunk["usage"] for chunk in replies["stream"][1] if chunk.get("usage")] for replies in (stock, ours)
    )
    assert (num_thinking(theirs), num_thinking(mine)) == (0, 7)
    assert num_thinking(stock["budget, responses"][1]["usage"]) == 0
    assert num_thinking(ours["budget, responses"][1]["usage"]) == 3


def test_defect_2_4_an_answer_after_a_closed_thought_is_the_answer(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "closed") == texts(stock, "closed, responses") == ("XYZ", None)
    assert texts(stock, "closed, streamed") == (None, "XYZ")
    for name in ("closed", "closed, streamed", "closed, responses"):
        assert texts(ours, name) == (None, "XYZ")


def test_defect_2_5_a_hidden_thought_is_thought_before_the_schema(stock: Replies, ours: Replies) -> None:
    assert stock["hidden, schema"][1]["usage"]["completion_tokens"] == len("10") + 1
    assert texts(ours, "hidden, schema") == (None, "10")
    assert num_thinking(ours["hidden, schema"][1]["usage"]) == 7


@pytest.mark.parametrize("name", ["history, schema", "history, schema, responses"])
def test_defect_2_5_an_earlier_turns_end_does_not_start_the_schema(stock: Replies, ours: Replies, name: str) -> None:
    assert texts(stock, name) == ("10", None)
    assert texts(ours, name) == ("abcdefg", "10")


def test_defect_2_6_messages_hide_and_count_thoughts_and_know_every_type(stock: Replies, ours: Replies) -> None:
    theirs, mine = stock["omitted"][1], ours["omitted"][1]
    assert theirs["content"][0]["thinking"] == "abcdefg" and "output_tokens_details" not in theirs["usage"]
    assert mine["content"][0]["thinking"] == "" and mine["content"][0]["signature"]
    assert num_thinking(mine["usage"]) == 7
    assert [block["text"] for block in mine["content"] if block["type"] == "text"] == ["XYZ"]
    assert (stock["between tools"][0], ours["between tools"][0]) == (400, 200)


def test_defect_2_7_the_responses_api_has_a_budget(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "budget, responses") == ("abcdefg", "XYZ")
    assert texts(ours, "budget, responses") == ("abc", "XYZ")


def test_defect_2_8_times_are_told_by_phase(stock: Replies, ours: Replies) -> None:
    assert not [key for key in stock["plain"][1]["metrics"] if "reasoning" in key or "answer" in key]
    info = ours["plain"][1]["reasoning_info"]
    assert 0 < info["time_to_first_thinking_ms"] < info["time_to_first_answer_ms"]


def test_defect_2_9_a_loop_ends_the_thought_and_not_the_reply(stock: Replies, ours: Replies) -> None:
    assert texts(stock, "loop") == ("abcdefgfgfg", None)
    assert stock["loop"][1]["choices"][0]["finish_reason"] == "repetition"
    assert texts(ours, "loop") == ("abcdefgfgfg", "XYZ")
    assert ours["loop"][1]["choices"][0]["finish_reason"] == "stop"
    assert ours["loop"][1]["reasoning_info"]["end_reason"] == "loop"


# --- the end of a running thought ----------------------------------------------------------------------------------


class Running:
    """A streamed chat completion with an endless thought, read in a thread."""

    def __init__(self, url: str, request_id: str, key: str = KEYS[0]) -> None:
        self.id, self.chunks, self.client = f"chatcmpl-{request_id}", [], client_of(url, key)  # type: ignore[var-annotated]
        self.client.headers["X-Request-Id"] = request_id
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        body = {"model": "scripted", "temperature": 0, "stream": True, **in_band("endless"), **LONG}
        with self.client.stream("POST", CHAT, json=body) as reply:
            for chunk in chunks(reply.iter_lines()):
                self.chunks.append(chunk)

    def thinks(self) -> None:
        """Returns once some of the thought is here."""
        deadline = time.monotonic() + 30
        while len(self.chunks) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def done(self) -> tuple[str | None, str | None, dict[str, Any]]:
        """(thought, answer, reasoning_info) of the whole reply."""
        self.thread.join(60)
        assert not self.thread.is_alive()
        (info,) = (chunk["reasoning_info"] for chunk in self.chunks if "reasoning_info" in chunk)
        return *texts({"": (200, self.chunks)}, ""), info


def end(url: str, request_id: str, key: str = KEYS[0], **more: Any) -> httpx.Response:
    with client_of(url, key) as client:
        return client.post(CONTROL, json={"id": request_id, "action": "reasoning_end", **more})


def test_a_running_thought_is_ended_and_answered(url: str) -> None:
    running = Running(url, "ended")
    running.thinks()
    reply = end(url, running.id, model="scripted")
    assert (reply.status_code, reply.json()) == (
        200,
        {"id": running.id, "action": "reasoning_end", "success": True},
    )
    thought, answer, info = running.done()
    assert running.chunks[0]["id"] == running.id
    assert answer == "XYZ"
    assert info["end_reason"] == "user"
    assert info["thinking_tokens"] == len(thought or "") < LONG["max_tokens"] - 10
    assert end(url, running.id).status_code == 404


def test_another_users_thought_cannot_be_ended(url: str) -> None:
    running = Running(url, "theirs", KEYS[1])
    running.thinks()
    refused, unknown = end(url, running.id, KEYS[0]), end(url, "chatcmpl-nobody", KEYS[0])
    # Nothing tells that it exists.
    assert refused.status_code == unknown.status_code == 404
    assert refused.text.replace(running.id, "chatcmpl-nobody") == unknown.text
    assert end(url, running.id, KEYS[1]).status_code == 200
    assert running.done()[1:] == ("XYZ", running.done()[2])


def test_without_a_key_nothing_is_ended(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        assert client.post(CONTROL, json={"id": "x", "action": "reasoning_end"}).status_code == 401


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "body: found no object"),
        (b"[]", "body: found no object"),
        (b'{"id": 5, "action": "reasoning_end"}', "body: found no object with a string `id`"),
        (b'{"id": "x"}', "`action`: found nothing, allowed: reasoning_end"),
        (b'{"id": "x", "action": "stop"}', "`action`: found 'stop', allowed: reasoning_end"),
        (b'{"id": "x", "action": "reasoning_end", "budget": 3}', "`budget`: found an unknown field"),
        (b'{"id": "' + b"x" * 5000 + b'", "action": "reasoning_end"}', "body: found more than 4096 bytes"),
        (b"\xff\xfe", "body: found no object"),
        (b"[" * 4000, "body: found values nested deeper than"),
    ],
)
def test_a_bad_control_message_is_refused_and_told_why(url: str, content: bytes, message: str) -> None:
    with client_of(url) as client:
        reply = client.post(CONTROL, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == (413 if "bytes" in message else 400)
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_body_nested_too_deep_is_a_400(url: str, path: str) -> None:
    with client_of(url) as client:
        reply = client.post(path, content=b"[" * 100_000, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert "nested deeper than" in reply.json()["error"]["message"]


def test_a_waiting_request_is_ended_when_its_turn_comes(url: str) -> None:
    first, second = Running(url, "first"), Running(url, "second")
    first.thinks()
    second.thinks()
    waiting = Running(url, "waiting")  # the server runs two at once
    time.sleep(0.3)
    replies: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: replies.append(end(url, waiting.id)), daemon=True)
    asking.start()
    time.sleep(0.3)
    assert not replies and not waiting.chunks
    end(url, first.id)
    asking.join(30)
    assert replies[0].json()["success"]
    thought, answer, info = waiting.done()
    assert (answer, info["end_reason"]) == ("XYZ", "user")
    # It is asked for each 20 ms: a thought of some tokens, not of thousands.
    assert len(thought or "") < 500
    end(url, second.id)
    assert first.done()[1] == second.done()[1] == "XYZ"


def test_a_client_that_leaves_ends_its_request(url: str) -> None:
    body = {"model": "scripted", "temperature": 0, "stream": True, **in_band("endless"), **LONG}
    with client_of(url) as client:
        client.headers["X-Request-Id"] = "left"
        with client.stream("POST", CHAT, json=body) as reply:
            next(chunks(reply.iter_lines()))
    deadline = time.monotonic() + 20
    while end(url, "chatcmpl-left").status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_prometheus_counts_thoughts_answers_and_ends(url: str, ours: object) -> None:
    with client_of(url) as client:
        before = metrics(client)
        send(client, "budget")
        send(client, "plain")
        after = metrics(client)
    grown = {name: after[name] - before.get(name, 0) for name in after if name.startswith("vllm_puzzle:")}
    assert grown["vllm_puzzle:thinking_tokens_total"] == 3 + 7
    assert grown["vllm_puzzle:answer_tokens_total"] == 2 * len("XYZ.")
    assert grown['vllm_puzzle:thinking_ends_total{reason="budget"}'] == 1
    assert grown['vllm_puzzle:thinking_ends_total{reason="natural"}'] == 1
    assert grown["vllm_puzzle:time_to_first_answer_token_seconds_count"] == 2


def test_the_list_of_models_tells_what_their_reasoning_can_do(url: str) -> None:
    with client_of(url) as client:
        (listed,) = client.get("/v1/models").json()["data"]
    assert listed["id"] == "scripted"
    assert listed["reasoning"]["modes"] == ["on", "off"] and listed["reasoning"]["can_disable"] is True
    assert listed["reasoning"]["budget"] == {"min": 0, "max": CEILING}
