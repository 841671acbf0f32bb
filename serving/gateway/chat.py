"""One chat completion in one call: through to the upstream and back, chunk by chunk."""

from __future__ import annotations

import json
from typing import Any

import httpx
from vllm_puzzle.serving.gateway import events
from vllm_puzzle.serving.gateway.exchange import Exchange, kept_headers
from vllm_puzzle.serving.gateway.plan import Plan
from vllm_puzzle.serving.gateway.tally import Tally, finish_choice, reasoning_info
from vllm_puzzle.serving.gateway.upstream import Upstream

CHAT_PATH = "/v1/chat/completions"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
IDENTITY = ("id", "object", "created", "model")


async def one_call(exchange: Exchange, upstream: Upstream, plan: Plan, tally: Tally) -> None:
    """Answer with the upstream's reply, its thought under both names and `reasoning_info` in it."""
    wants_usage = _wants_usage(plan.body)
    body = with_usage(plan.body) if plan.body.get("stream") is True else plan.body
    async with upstream.post(CHAT_PATH, exchange.passed_headers(), body) as response:
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            await _stream(exchange, response, plan, tally, wants_usage)
        else:
            await _whole(exchange, response, plan, tally)


def with_usage(body: dict[str, Any]) -> dict[str, Any]:
    """A streamed request whose last chunk tells the usage."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        return body  # the upstream says what is wrong with it
    return {**body, "stream": True, "stream_options": {**options, "include_usage": True}}


def _wants_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


async def _whole(exchange: Exchange, response: httpx.Response, plan: Plan, tally: Tally) -> None:
    content = await response.aread()
    reply = events.parse(content)
    if reply is None or events.choices_of(reply) is None:
        await exchange.answer(response.status_code, content, response.headers.get("content-type", ""))
        return
    tally.usage = reply.get("usage")
    for choice in reply["choices"]:
        tally.see(choice)
        finish_choice(choice, plan.effective.is_visible)
    reply["reasoning_info"] = reasoning_info(plan, tally)
    content = json.dumps(reply, ensure_ascii=False).encode()
    headers = kept_headers(response.headers.raw, b"content-encoding")
    await exchange.start(response.status_code, [*headers, (b"content-length", str(len(content)).encode())])
    await exchange.write(content)
    await exchange.end()


async def _stream(exchange: Exchange, response: httpx.Response, plan: Plan, tally: Tally, wants_usage: bool) -> None:
    await exchange.start(200, kept_headers(response.headers.raw, b"content-encoding"))
    identity: dict[str, Any] = {}
    async for batch in events.batches(response.aiter_raw()):
        passed = [_pass(event, plan, tally, identity) for event in batch]
        if any(passed):
            await exchange.write(b"".join(passed))
    await write_last(exchange, plan, tally, identity, wants_usage)


def _pass(event: bytes, plan: Plan, tally: Tally, identity: dict[str, Any]) -> bytes:
    """What the client gets of one event. The usage chunk and `[DONE]` wait for the end."""
    data = events.data_of(event)
    if data is None:
        return event
    if data == b"[DONE]":
        return b""
    chunk = events.parse(data)
    if chunk is None or events.choices_of(chunk) is None:
        return event
    identity.update({key: chunk[key] for key in IDENTITY if key in chunk})
    tally.usage = chunk.get("usage") or tally.usage
    if not chunk["choices"]:
        return b""
    is_changed = False
    for choice in chunk["choices"]:
        tally.see(choice)
        is_changed |= finish_choice(choice, plan.effective.is_visible)
    if not is_changed:
        return event
    return b"" if _is_empty(chunk) else events.encode(chunk)


def _is_empty(chunk: dict[str, Any]) -> bool:
    """Whether nothing is left of a chunk out of which a thought was taken."""
    return all(not any((c.get("delta") or {}).values()) and not c.get("finish_reason") for c in chunk["choices"])


async def write_last(exchange: Exchange, plan: Plan, tally: Tally, identity: dict[str, Any], wants_usage: bool) -> None:
    """The last chunk, with no choices: `reasoning_info`, and the usage for a client that asked; then `[DONE]`."""
    chunk = {**identity, "choices": [], "reasoning_info": reasoning_info(plan, tally)}
    if wants_usage:
        chunk["usage"] = tally.usage
    await exchange.write(events.encode(chunk) + events.DONE)
    await exchange.end()
