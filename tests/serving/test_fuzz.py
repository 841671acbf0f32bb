"""10,000 request bodies through the dial: middleware, resolution, vLLM's own request classes; no engine."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from dial_models import FAMILIES, dial
from fuzz_bodies import CHAT, LEAVES, MESSAGES, RESPONSES, UNREADABLE, Case, generate
from fuzz_oracle import MEANS, BadField, check_error, check_info, read_simply, seen
from vllm_puzzle.serving.dial.dialects import FIELDS
from vllm_puzzle.serving.dial.middleware import SHARED, DialMiddleware
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.request import RequestError
from vllm_puzzle.serving.dial.resolve import ModelDial
from vllm_puzzle.serving.dial.turn import TURN
from vllm_puzzle.serving.reasoning_endpoint import apply_to_chat, apply_to_responses

NUMBER, CEILING = 10_000, 40
DIALS = [dial(family, ReasoningPolicy(ceiling=CEILING)) for family in FAMILIES]


class HandlersOnly:
    """The server behind the middleware, as far as it goes without an engine: parse, apply the wish, answer."""

    def __init__(self) -> None:
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
        from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        self.classes: dict[str, Any] = {
            CHAT: ChatCompletionRequest, RESPONSES: ResponsesRequest, MESSAGES: AnthropicMessagesRequest,
        }  # fmt: skip
        self.translate = AnthropicServingMessages.to_chat_completion_request
        self.dial: ModelDial = DIALS[0]
        self.body: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = (await receive())["body"]
        status, reply = self.answer(scope["path"], raw)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})

    def answer(self, path: str, raw: bytes) -> tuple[int, Any]:
        try:
            self.body = json.loads(raw)
            request = self.classes[path].model_validate(json.loads(raw))  # validators edit what they are given
            request = self.translate(request) if path == MESSAGES else request
        except Exception as error:  # of vLLM, whose own answers are not the matter here
            return 400, {"error": {"message": str(error)[:300], "type": "x", "param": None, "code": 400}}
        turn = TURN.get()
        assert turn is not None
        try:
            apply = apply_to_responses if path == RESPONSES else apply_to_chat
            turn.effective = apply(request, turn.wish, self.dial)
        except RequestError as error:
            return 400, {"error": {"message": f"ours: {error}", "type": "x", "param": error.param, "code": 400}}
        return 200, {}


async def send(app: HandlersOnly, case: Case) -> tuple[int, Any]:
    """The reply to one case; `app.body` is what came through."""
    app.body, sent = None, []

    async def receive() -> Any:
        return {"type": "http.request", "body": case.raw, "more_body": False}

    async def reply(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", case.content_type.encode()), (b"content-length", str(len(case.raw)).encode())]
    scope = {"type": "http", "method": "POST", "path": case.path, "headers": headers}
    await DialMiddleware(app)(scope, receive, reply)
    return sent[0]["status"], json.loads(sent[1]["body"])


def check(app: HandlersOnly, case: Case, status: int, body: Any) -> str:
    """One case's reply; returns the kind of outcome, to be counted."""
    try:
        wanted = read_simply(case)
    except BadField:
        check_error(case, status, body, is_ours=True)
        assert app.body is None, "it must not reach the server"
        return "refused"
    if status != 200:
        check_error(case, status, body, is_ours=body["error"]["message"].startswith("ours"))
        return "not readable" if case.fault in UNREADABLE else "refused behind"
    assert wanted is not None
    original = seen(case)
    assert original is not None
    kept = {key: value for key, value in original.items() if key not in FIELDS or key in SHARED}
    format_only = {key: value for key, value in (original.get("output_config") or {}).items() if key != "effort"}
    if case.path == MESSAGES and format_only:
        kept["output_config"] = format_only
    assert app.body == kept, "what is no reasoning field stays as it is"
    info, effective = body["reasoning_info"], body["reasoning_info"]["effective"]
    assert info["requested"] == wanted.requested
    budget = effective["budget"]
    assert budget is None or budget <= CEILING
    assert effective["mode"] == "off" or budget is not None, "under a ceiling, thinking has a limit"
    if wanted.budget is not None and wanted.budget >= 0 and budget is not None and wanted.mode == "on":
        assert budget <= wanted.budget
    return "silent" if wanted.is_silent else "done"


def test_ten_thousand_bodies_are_refused_in_one_line_or_done_as_a_simple_reading_says() -> None:
    app, outcomes = HandlersOnly(), Counter[str]()

    async def run() -> None:
        for index, case in enumerate(generate(NUMBER)):
            app.dial = DIALS[index % len(DIALS)]
            try:
                outcomes[check(app, case, *await send(app, case))] += 1
            except Exception as error:
                error.add_note(f"{case} with {app.dial.name}")
                raise

    asyncio.run(run())
    assert sum(outcomes.values()) == NUMBER
    # Each kind is there in numbers: none of the checks above is idle.
    assert min(outcomes[kind] for kind in ("refused", "not readable", "refused behind", "silent", "done")) > 150, (
        outcomes
    )


def test_the_simple_reading_knows_every_field_of_the_table() -> None:
    assert {".".join(leaf) for leaf in LEAVES} == set(MEANS)


def test_the_oracle_sees_a_wrong_reply() -> None:
    case = Case(CHAT, b'{"thinking_budget": 5}')
    wanted = read_simply(case)
    assert wanted is not None
    good = {"requested": wanted.requested, "effective": {"mode": "on", "budget": 5}, "thinking_tokens": 5}
    check_info(good, wanted, CEILING)
    wrong = ({"thinking_tokens": 6}, {"requested": {**wanted.requested, "budget": 6}},
             {"effective": {"mode": "off", "budget": 5}}, {"choices": [{"thinking_tokens": 6}]})  # fmt: skip
    for change in wrong:
        with pytest.raises(AssertionError):
            check_info({**good, **change}, wanted, CEILING)
    message = {"message": "a", "type": "b", "param": None, "code": 400}
    check_error(case, 400, {"error": message}, is_ours=True)
    for status, body in (
        (500, {"error": message}),
        (400, {"error": {**message, "message": "a\nb"}}),
        (400, {"detail": 1}),
    ):
        with pytest.raises((AssertionError, KeyError)):
            check_error(case, status, body, is_ours=True)
