"""Reads the reasoning fields of every request body before the server's own parser sees it, and finishes the reply.

ASGI, no vLLM: the turn goes to the handlers in a context variable, the body goes on without the fields that other
ecosystems write (a strict server would refuse them, a lenient one ignore them). Errors are answered here, in the shape
of the API that was called.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from vllm_puzzle.serving.dial.dialects import FIELDS, read_statements
from vllm_puzzle.serving.dial.policy import MAX_BODY_BYTES
from vllm_puzzle.serving.dial.reply import COMPACT, finish_body, finish_event
from vllm_puzzle.serving.dial.request import RequestError, combine
from vllm_puzzle.serving.dial.turn import TURN, Turn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
EVENT_END = b"\n\n"
# Objects that hold other things too: their reasoning keys stay, as nobody else reads them.
SHARED = ("chat_template_kwargs", "nvext", "custom_params", "vllm_xargs", "extra_body")


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
            turn = Turn(scope["path"], authorization=_header(scope, b"authorization"))
            if body is not None:
                turn.wish = combine(read_statements(body))
                turn.wants_continuous_usage = _wants_continuous_usage(body)
                kept = without_fields(body, scope["path"])
                # A long prompt is not encoded again for nothing.
                raw = raw if kept == body else json.dumps(kept).encode()
        except RequestError as error:
            await _answer(send, scope["path"], error)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        TURN.set(turn)
        await self.app(scope, _replay(raw, receive), ReplySender(turn, send))


class ReplySender:
    """Sends the reply on, finished by `reply.py`: whole once all of it is there, streamed event by event."""

    def __init__(self, turn: Turn, send: Send) -> None:
        self.turn, self.send = turn, send
        self.start: MutableMapping[str, Any] | None = None  # a whole reply's head, held back until its length is known
        self.is_stream = False
        self.rest = b""

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """One ASGI message of the reply. Errors and what is no JSON pass untouched."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.is_stream = kind.startswith(b"text/event-stream")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self.start = message
                return
        elif message["type"] == "http.response.body":
            if self.start is not None:
                await self._whole(message)
                return
            if self.is_stream:
                await self._stream(message)
                return
        await self.send(message)

    async def _whole(self, message: MutableMapping[str, Any]) -> None:
        self.rest += message.get("body", b"")
        if message.get("more_body", False) or self.start is None:
            return
        body = _parse(self.rest)
        if body is not None:
            finish_body(body, self.turn)
            self.rest = json.dumps(body, ensure_ascii=False, separators=COMPACT).encode()
        headers = [(name, value) for name, value in self.start["headers"] if name != b"content-length"]
        await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(self.rest)).encode())]})
        await self.send({"type": "http.response.body", "body": self.rest, "more_body": False})

    async def _stream(self, message: MutableMapping[str, Any]) -> None:
        more = message.get("more_body", False)
        *events, self.rest = (self.rest + message.get("body", b"")).split(EVENT_END)
        finished = [finish_event((event + EVENT_END).decode(), self.turn) for event in events]
        body = "".join(event for event in finished if event is not None).encode()
        if not more:
            body += self.rest
        if body or not more:
            await self.send({"type": "http.response.body", "body": body, "more_body": more})


def without_fields(body: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The body without reasoning fields; what the handlers shall see of them they get from the wish."""
    kept = {key: value for key, value in body.items() if key not in FIELDS or key in SHARED}
    if path == "/v1/messages" and isinstance(body.get("output_config"), Mapping):
        rest = {key: value for key, value in body["output_config"].items() if key != "effort"}
        kept |= {"output_config": rest} if rest else {}
    return kept


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _wants_continuous_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("continuous_usage_stats"))


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
    except RecursionError:  # which the server's own parser would not survive either
        raise RequestError("body: found JSON nested too deep, allowed: some hundred levels", "body") from None
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
