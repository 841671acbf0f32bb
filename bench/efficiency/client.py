"""One streamed chat completion: what came, and when. Nothing is graded or derived here.

Stamps are taken as bytes arrive, before they are parsed. A chunk is no token and a role is no text: counts come from
the server's usage, with every chunk where it sends that, and times from chunks that carry text.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm
from vllm_puzzle.bench.efficiency.question import Question

DONE = b"[DONE]"
MAX_ERROR = 300
PAGE_TIMEOUT_S = 5.0
# What kind of failure ended a request; decides when a run gives up.
CONNECTION, HTTP, STREAM, TIME = "connection", "http", "stream", "timeout"


class Piece(NamedTuple):
    """Text of one phase in one chunk. tokens: generated so far, None where the server does not tell."""

    stamp: float
    text: str
    tokens: int | None


@dataclass(slots=True)
class Reply:
    """What one request got. Times are seconds of the clock.

    thought, answer: pieces as they came, tool calls among the answer's with an empty text. tools: their text. chunks:
    how many carried text. usage: the last the server sent. info: its `reasoning_info`. failure: one of the kinds above,
    with the `error`.
    """

    sent: float
    done: float = 0.0
    thought: list[Piece] = field(default_factory=list)
    answer: list[Piece] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    chunks: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    status: int | None = None
    is_ended: bool = False
    failure: str | None = None
    error: str | None = None

    def fail(self, kind: str, error: str) -> None:
        """The first failure is what counts."""
        if self.failure is None:
            self.failure, self.error = kind, error[:MAX_ERROR]


class Events:
    """Bytes of a stream → a Reply, event by event."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self._rest = b""
        self._listed = 0  # tokens in `token_ids`, where chunks list them

    def feed(self, data: bytes, stamp: float) -> None:
        """Take what arrived at `stamp`. An event counts from when its last byte came."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), stamp)

    def _event(self, data: bytes, stamp: float) -> None:
        reply = self.reply
        if data == DONE:
            reply.is_ended = True
            return
        try:
            chunk = json.loads(data.decode())
            self._chunk(chunk, stamp)
        except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
            reply.fail(STREAM, f"an event that is no chunk ({type(error).__name__}): {data[:80]!r}")

    def _chunk(self, chunk: dict[str, Any], stamp: float) -> None:
        reply = self.reply
        count = None
        usage = chunk.get("usage")
        if usage:
            reply.usage.update(usage)
            count = usage.get("completion_tokens")
        if chunk.get("reasoning_info"):
            reply.info = chunk["reasoning_info"]
        if chunk.get("error"):
            error = chunk["error"]
            reply.fail(STREAM, str(error.get("message") if isinstance(error, dict) else error))
        choices = chunk.get("choices")
        if not choices:
            return
        choice = choices[0]
        listed = choice.get("token_ids")
        if listed:
            self._listed += len(listed)
            count = self._listed if count is None else count
        if choice.get("finish_reason"):
            reply.finish_reason = choice["finish_reason"]
        delta = choice.get("delta")
        if delta:
            self._delta(delta, stamp, count)

    def _delta(self, delta: Mapping[str, Any], stamp: float, count: int | None) -> None:
        reply = self.reply
        thought = delta.get("reasoning") or delta.get("reasoning_content")
        if thought:
            reply.thought.append(Piece(stamp, thought, count))
        text = delta.get("content")
        if text:
            reply.answer.append(Piece(stamp, text, count))
        called = ""
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            called += (function.get("name") or "") + (function.get("arguments") or "")
        if called:
            reply.tools.append(called)
            reply.answer.append(Piece(stamp, "", count))
        if thought or text or called:
            reply.chunks += 1


async def ask(
    transport: httpx.AsyncBaseTransport,
    arm: Arm,
    question: Question,
    clock: Callable[[], float],
    fields: Mapping[str, Any] | None = None,
) -> Reply:
    """Ask one question, once. fields: more request fields, such as a cache salt. Only cancellation is raised."""
    messages = [dict(message) for message in question.messages]
    body = arm.body(messages, {**question.fields, **(fields or {})})
    headers = {"accept-encoding": "identity", "content-type": "application/json", **arm.headers}
    request = httpx.Request("POST", arm.url, content=json.dumps(body).encode(), headers=headers)
    reply = Reply(sent=clock())
    try:
        async with asyncio.timeout(arm.timeout_s):
            await _read(transport, request, reply, clock)
    except TimeoutError:
        reply.fail(TIME, f"no end after {arm.timeout_s:g} s")
    except httpx.ConnectError as error:
        reply.fail(CONNECTION, f"no connection: {error}")
    except (httpx.HTTPError, OSError) as error:
        reply.fail(STREAM, f"{type(error).__name__}: {error}")
    if reply.failure is None and reply.finish_reason is None and not reply.is_ended:
        reply.fail(STREAM, "the stream ended without a finish reason")
    if reply.failure is None and reply.finish_reason in ("error", "abort"):
        reply.fail(STREAM, f"the server ended it: {reply.finish_reason}")
    if reply.failure is not None:
        reply.done = clock()
    return reply


async def _read(
    transport: httpx.AsyncBaseTransport, request: httpx.Request, reply: Reply, clock: Callable[[], float]
) -> None:
    response = await transport.handle_async_request(request)
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    try:
        reply.status = response.status_code
        if response.status_code != httpx.codes.OK:
            text = b"".join([part async for part in stream]).decode(errors="replace")
            reply.fail(HTTP, f"HTTP {response.status_code}: {_message(text)}")
            return
        events = Events(reply)
        # Of a transport that stamps by itself, when the bytes arrived; of another, when they got here.
        stamp = reply.sent
        async for data in stream:
            arrived = getattr(stream, "stamp", None)
            stamp = clock() if arrived is None else arrived
            events.feed(data, stamp)
        events.feed(b"\n", stamp)  # an event without its line end is one too
        reply.done = stamp
    finally:
        await stream.aclose()


def _message(text: str) -> str:
    """What an error body says, in one line."""
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())


async def get(transport: httpx.AsyncBaseTransport, url: str, headers: Mapping[str, str]) -> str:
    """A page of the server's as text, empty where there is none."""
    status, text = await _fetch(transport, url, headers)
    return text if status == httpx.codes.OK else ""


async def is_up(transport: httpx.AsyncBaseTransport, url: str, headers: Mapping[str, str]) -> bool:
    """Whether anything answers, be it an error."""
    return (await _fetch(transport, url, headers))[0] is not None


async def _fetch(transport: httpx.AsyncBaseTransport, url: str, headers: Mapping[str, str]) -> tuple[int | None, str]:
    try:
        async with asyncio.timeout(PAGE_TIMEOUT_S):
            response = await transport.handle_async_request(httpx.Request("GET", url, headers=dict(headers)))
            stream = response.stream
            assert isinstance(stream, httpx.AsyncByteStream)
            try:
                return response.status_code, b"".join([part async for part in stream]).decode(errors="replace")
            finally:
                await stream.aclose()
    except (TimeoutError, httpx.HTTPError, OSError):
        return None, ""
