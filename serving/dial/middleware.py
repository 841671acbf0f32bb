"""Reads the reasoning fields of every request body, before the server's own parser sees it.

ASGI, no vLLM: the wish goes to the handlers in a context variable, the body goes on without the fields that other
ecosystems write (a strict server would refuse them, a lenient one ignore them). Errors are answered here, in the shape
of the API that was called.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from vllm_puzzle.serving.dial.dialects import FIELDS, read_statements
from vllm_puzzle.serving.dial.policy import MAX_BODY_BYTES
from vllm_puzzle.serving.dial.request import ReasoningRequest, RequestError, combine

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
# Objects that hold other things too: their reasoning keys stay, as nobody else reads them.
SHARED = ("chat_template_kwargs", "nvext", "custom_params", "vllm_xargs", "extra_body")

WISH: ContextVar[ReasoningRequest | None] = ContextVar("reasoning_request", default=None)


class DialMiddleware:
    """Wraps an ASGI app; other paths and methods pass untouched."""

    def __init__(self, app: App, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        try:
            raw = await _read_body(receive, self.max_body_bytes)
            body = _parse(raw)
            if body is not None:
                WISH.set(combine(read_statements(body)))
                kept = without_fields(body, scope["path"])
                # A long prompt is not encoded again for nothing.
                raw = raw if kept == body else json.dumps(kept).encode()
        except RequestError as error:
            await _answer(send, scope["path"], error)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        await self.app(scope, _replay(raw, receive), send)


def without_fields(body: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The body without reasoning fields; what the handlers shall see of them they get from the wish."""
    kept = {key: value for key, value in body.items() if key not in FIELDS or key in SHARED}
    if path == "/v1/messages" and isinstance(body.get("output_config"), Mapping):
        rest = {key: value for key, value in body["output_config"].items() if key != "effort"}
        kept |= {"output_config": rest} if rest else {}
    return kept


async def _read_body(receive: Receive, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise RequestError(f"body: found more than {max_bytes} bytes, allowed: at most that", "body")
        more = message.get("more_body", False)
    return b"".join(parts)


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The JSON object, or None: the server itself says what is wrong with anything else."""
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _replay(raw: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replayed


async def _answer(send: Send, path: str, error: RequestError) -> None:
    """HTTP 400 in OpenAI's shape, or in Anthropic's on its path."""
    kind = {"type": "invalid_request_error", "message": str(error)}
    body: dict[str, Any] = {"error": {**kind, "param": error.param, "code": 400}}
    if path == "/v1/messages":
        body = {"type": "error", "error": kind}
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})
