"""The dial without a server: the middleware that reads the fields, and the reply's thought."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vllm_puzzle.serving.dial.middleware import DialMiddleware, without_fields
from vllm_puzzle.serving.dial.request import ReasoningRequest
from vllm_puzzle.serving.dial.turn import TURN


def call(
    path: str, raw: bytes, method: str = "POST", root_path: str = "", **options: int
) -> tuple[list[Any], dict[str, Any]]:
    """Send a body through the middleware, in two parts. Returns what was answered, and what the app saw."""
    sent: list[Any] = []
    seen: dict[str, Any] = {}
    parts = [
        {"type": "http.request", "body": raw[:5], "more_body": True},
        {"type": "http.request", "body": raw[5:], "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        turn = TURN.get()
        seen.update(body=body, wish=turn and turn.wish, length=dict(scope["headers"]).get(b"content-length"))
        seen["next"] = await receive()

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-length", str(len(raw)).encode())]}
    scope["root_path"] = root_path
    asyncio.run(DialMiddleware(app, **options)(scope, receive, send))
    return sent, seen


def test_the_middleware_hands_on_the_wish_and_a_body_without_foreign_fields() -> None:
    body = {"model": "m", "think": True, "thinking_budget": 4, "nvext": {"x": 1}, "chat_template_kwargs": {"a": 1}}
    sent, seen = call("/v1/chat/completions", json.dumps(body).encode())
    assert not sent
    assert json.loads(seen["body"]) == {"model": "m", "nvext": {"x": 1}, "chat_template_kwargs": {"a": 1}}
    assert int(seen["length"]) == len(seen["body"])
    assert seen["wish"] == ReasoningRequest(is_on=True, budget=4)
    assert seen["next"] == {"type": "http.disconnect"}, "a client that leaves must still be noticed"


def test_a_body_without_such_fields_goes_on_byte_for_byte() -> None:
    raw = b'{ "model": "m",  "messages": [], "temperature": 1.0 }'
    assert call("/v1/chat/completions", raw)[1]["body"] == raw


@pytest.mark.parametrize(("path", "method"), [("/v1/models", "POST"), ("/v1/chat/completions", "PUT")])
def test_other_paths_and_methods_pass_untouched(path: str, method: str) -> None:
    raw = json.dumps({"thinking_tokens": 1}).encode()
    assert call(path, raw, method)[1]["body"] == raw


def test_a_body_that_is_no_json_object_is_the_servers_business() -> None:
    for raw in (b"{nonsense", b"[1, 2, 3]"):
        sent, seen = call("/v1/responses", raw)
        assert not sent
        assert seen["body"] == raw


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_an_error_has_the_shape_of_the_api_that_was_called(path: str) -> None:
    (start, reply), seen = call(path, json.dumps({"think": True, "reasoning_effort": "none"}).encode())
    assert not seen
    assert start["status"] == 400
    error = json.loads(reply["body"])
    assert "`reasoning_effort` (reasoning off) contradicts `think` (reasoning on)" in error["error"]["message"]
    assert (error.get("type") == "error") == (path == "/v1/messages")


def test_a_body_beyond_the_operators_limit_is_refused() -> None:
    raw = json.dumps({"model": "m" * 40}).encode()
    (start, reply), seen = call("/v1/chat/completions", raw, max_body_bytes=len(raw) - 1)
    assert (start["status"], seen) == (413, {})
    assert f"found more than {len(raw) - 1} bytes" in json.loads(reply["body"])["error"]["message"]
    assert call("/v1/chat/completions", raw, max_body_bytes=len(raw))[1]["body"] == raw


def test_anthropics_output_format_stays_while_its_effort_is_taken() -> None:
    body = {"output_config": {"effort": "low", "format": {"type": "json_schema"}}, "thinking": {"type": "adaptive"}}
    assert without_fields(body, "/v1/messages") == {"output_config": {"format": {"type": "json_schema"}}}
    assert without_fields({"output_config": {"effort": "low"}}, "/v1/messages") == {}


@pytest.mark.parametrize("path", ["/api/v1/chat/completions", "/v1/chat/completions"])
def test_the_dial_is_there_below_a_root_path_whether_a_proxy_takes_it_off_or_not(path: str) -> None:
    raw = json.dumps({"model": "m", "think": True}).encode()
    assert call(path, raw, root_path="/api")[1]["wish"] == ReasoningRequest(is_on=True)
    assert call("/apiv1/chat/completions", raw, root_path="/api")[1]["wish"] is None
