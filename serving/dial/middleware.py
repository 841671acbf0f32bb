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
from vllm_puzzle.serving.dial.json_body import Receive, declared_size, parse_body, read_body
from vllm_puzzle.serving.dial.policy import MAX_BODY_BYTES
from vllm_puzzle.serving.dial.reply import COMPACT, MESSAGES, error_body, finish_body, finish_event, shaped_error
from vllm_puzzle.serving.dial.request import RequestError, combine
from vllm_puzzle.serving.dial.turn import TURN, Turn

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/responses", MESSAGES)
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
        path = _route(scope) if scope["type"] == "http" else ""
        if path not in PATHS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            raw = await read_body(receive, self.max_body_bytes, declared_size(dict(scope["headers"])))
            body = parse_body(raw)
            turn = Turn(path, authorization=_header(scope, b"authorization"))
            if body is not None:
                turn.wish = combine(read_statements(body))
                turn.wants_continuous_usage = _wants_continuous_usage(body)
                kept = without_fields(body, path)
                # A long prompt is not encoded again for nothing.
                raw = raw if kept == body else json.dumps(kept).encode()
        except RequestError as error:
            await _answer(send, path, error)
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
        """One ASGI message of the reply. What is no JSON passes untouched."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.is_stream = kind.startswith(b"text/event-stream")
            if kind.startswith(b"application/json"):
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
        body, status = _object(self.rest), self.start["status"]
        if body is not None:
            done = finish_body(body, self.turn) if status == 200 else shaped_error(self.turn.path, body, status)
            if status == 200 or done is not body:
                self.rest = json.dumps(done, ensure_ascii=False, separators=COMPACT).encode()
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
    if path == MESSAGES and isinstance(body.get("output_config"), Mapping):
        rest = {key: value for key, value in body["output_config"].items() if key != "effort"}
        kept |= {"output_config": rest} if rest else {}
    return kept


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _wants_continuous_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, Mapping) and bool(options.get("continuous_usage_stats"))


def _route(scope: Scope) -> str:
    """The path below the prefix that the server is mounted at (`--root-path`), by which routes are found."""
    path, prefix = scope["path"], scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def _object(reply: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(reply)
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
    """An HTTP error in OpenAI's shape, or in Anthropic's on its path."""
    content = json.dumps(error_body(path, error.status, str(error), error.param)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
