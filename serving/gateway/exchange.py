"""One HTTP exchange with a client, over ASGI: the request's body within a limit, the reply, and whether he has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any
from urllib.parse import quote

from vllm_puzzle.serving.gateway.errors import GatewayError, UpstreamRefusal, error_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_BODY_BYTES = 256 * 1024 * 1024
# Headers that belong to one connection, and those that we set anew.
NOT_PASSED = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host"}
NOT_PASSED |= {b"content-length", b"proxy-authenticate", b"proxy-authorization", b"expect"}


class Disconnected(Exception):
    """The client left before its request was complete."""


class Exchange:
    """A request and the means to answer it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int = MAX_BODY_BYTES) -> None:
        # One spelling, so that a slash at the end is no way around the dial.
        self.path: str = scope["path"].rstrip("/")
        # As the client wrote it: an escaped slash stays one.
        self.target: str = (scope.get("raw_path") or quote(scope["path"]).encode()).decode("ascii", "replace")
        self.method: str = scope["method"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: Headers = list(scope["headers"])
        self.is_started = False
        self._receive, self._send, self._max_body = receive, send, max_body

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        return next((value for key, value in self.headers if key == name), None)

    def passed_headers(self, *without: bytes) -> Headers:
        """The client's headers that go on to the upstream."""
        return kept_headers(self.headers, *without)

    async def body(self) -> bytes:
        """The whole body. Raises GatewayError 413 past the limit."""
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise GatewayError(413, f"body: found more than {self._max_body} bytes, allowed: at most that")
            more = message.get("more_body", False)
        return b"".join(parts)

    async def json_body(self) -> dict[str, Any]:
        """The body as a JSON object. Raises GatewayError 400 for anything else."""
        raw = await self.body()
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise GatewayError(400, f"body: found no JSON ({error}), allowed: a JSON object") from error
        if not isinstance(value, dict):
            raise GatewayError(400, f"body: found JSON of type {type(value).__name__}, allowed: a JSON object")
        return value

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Status and headers."""
        self.is_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def write(self, data: bytes) -> None:
        """A part of the body, at once."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Nothing more follows."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def answer(self, status: int, content: bytes, content_type: str = "application/json") -> None:
        """A whole reply."""
        length = str(len(content)).encode()
        await self.start(status, [(b"content-type", content_type.encode()), (b"content-length", length)])
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def refuse(self, error: GatewayError | UpstreamRefusal) -> None:
        """An error: as the whole reply, or as the last event of a stream that has begun."""
        if isinstance(error, UpstreamRefusal):
            content, content_type = error.content, error.content_type
        else:
            content, content_type = json.dumps(error_body(self.path, error)).encode(), "application/json"
        if not self.is_started:
            await self.answer(error.status, content, content_type)
            return
        await self.write(b"data: " + b" ".join(content.split(b"\n")) + b"\n\n")
        await self.end()

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and break it off when the client leaves. The body must have been read."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            for each in (task, gone):
                if not each.done():
                    each.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await each

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


def kept_headers(headers: Iterable[tuple[bytes, bytes]], *without: bytes) -> Headers:
    """Headers that one side's message shares with the other's."""
    dropped = NOT_PASSED | set(without)
    return [(name.lower(), value) for name, value in headers if name.lower() not in dropped]
