"""The dial without a server: what a wish becomes for a model, the system line, the middleware."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vllm_puzzle.serving.dial.middleware import DialMiddleware, without_fields
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError
from vllm_puzzle.serving.dial.resolve import ModelDial, resolve, template_arguments
from vllm_puzzle.serving.dial.system_line import needs_system_line, read_lines, with_system_line
from vllm_puzzle.serving.dial.turn import TURN

QWEN = ModelDial(frozenset({"messages", "enable_thinking"}))
SUPER = ModelDial(frozenset({"enable_thinking", "low_effort", "truncate_history_thinking"}))
KIMI = ModelDial(frozenset({"thinking", "thinking_effort"}))
NO_SWITCH = ModelDial(frozenset({"messages"}))
USER = {"role": "user", "content": "3+4"}


def wish(**fields: Any) -> ReasoningRequest:
    return ReasoningRequest(**fields, sources={name: name for name in fields})


@pytest.mark.parametrize(
    ("model", "asked", "arguments", "budget"),
    [
        (QWEN, {}, {}, None),
        (QWEN, {"is_on": True}, {"enable_thinking": True}, None),
        (QWEN, {"is_on": False}, {"enable_thinking": False}, None),
        (QWEN, {"is_on": False, "budget": 0}, {"enable_thinking": False}, None),
        (QWEN, {"is_on": True, "budget": 9}, {"enable_thinking": True}, 9),
        (QWEN, {"is_on": True, "budget": -1}, {"enable_thinking": True}, None),
        (QWEN, {"is_on": True, "effort": "high"}, {"enable_thinking": True}, None),
        (SUPER, {"is_on": True, "effort": "minimal"}, {"enable_thinking": True, "low_effort": True}, None),
        (SUPER, {"is_on": True, "effort": "high"}, {"enable_thinking": True}, None),
        (SUPER, {"keeps_history": True}, {"truncate_history_thinking": False}, None),
        (KIMI, {"is_on": False}, {"enable_thinking": False, "thinking": False}, None),
        (KIMI, {"effort": "max"}, {"thinking_effort": "max"}, None),
        (NO_SWITCH, {"is_on": False}, {"enable_thinking": False}, 0),
        (NO_SWITCH, {"is_on": True, "budget": 5}, {"enable_thinking": True}, 5),
    ],
)
def test_a_wish_becomes_template_arguments_and_a_budget(
    model: ModelDial, asked: dict[str, Any], arguments: dict[str, Any], budget: int | None
) -> None:
    done = resolve(wish(**asked), model)
    assert (dict(done.template_arguments), done.budget) == (arguments, budget)


def test_a_model_that_only_a_level_switches_off_gets_that_level() -> None:
    by_level = ModelDial(frozenset({"messages", "reasoning_effort"}), has_budget=False)
    done = resolve(wish(is_on=False), by_level)
    assert (done.effort, done.budget) == ("none", None)
    assert resolve(wish(is_on=True, effort="low"), by_level).template_arguments["reasoning_effort"] == "low"
    assert resolve(wish(is_on=False), QWEN).effort is None


def test_what_a_model_or_a_server_cannot_do_is_refused_by_field() -> None:
    uncounted = ModelDial(frozenset(), has_budget=False)
    for asked in ({"is_on": True, "budget": 5}, {"is_on": False}):
        with pytest.raises(RequestError, match="allowed with --reasoning-parser"):
            resolve(wish(**asked), uncounted)
    with pytest.raises(RequestError, match="`keeps_history`: found with a model whose template has no such rule"):
        resolve(wish(keeps_history=False), QWEN)


def test_a_templates_variables_are_read_from_its_syntax_not_its_text() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinking is true %}x{% endif %} low_effort"
    assert template_arguments(template) == {"messages", "thinking"}
    with_tags = "{% generation %}{{ enable_thinking }}{% endgeneration %} detailed thinking on"
    assert template_arguments(with_tags) == {"enable_thinking"}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], []),
        ([system("detailed thinking off"), USER], [False]),
        ([system("Be brief.\n Detailed Thinking ON "), USER], [True]),
        ([system([{"type": "text", "text": "detailed thinking off"}]), USER], [False]),
        ([system("please use detailed thinking on this"), USER], []),
        ([{"role": "user", "content": "detailed thinking off"}], []),
        ([system("detailed thinking on\ndetailed thinking off"), USER], [True, False]),
    ],
)
def test_the_system_line_is_read_where_it_counts(messages: list[Any], expected: list[bool]) -> None:
    assert read_lines(messages) == expected


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


def call(path: str, raw: bytes, method: str = "POST") -> tuple[list[Any], dict[str, Any]]:
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
    asyncio.run(DialMiddleware(app)(scope, receive, send))
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


def test_anthropics_output_format_stays_while_its_effort_is_taken() -> None:
    body = {"output_config": {"effort": "low", "format": {"type": "json_schema"}}, "thinking": {"type": "adaptive"}}
    assert without_fields(body, "/v1/messages") == {"output_config": {"format": {"type": "json_schema"}}}
    assert without_fields({"output_config": {"effort": "low"}}, "/v1/messages") == {}
