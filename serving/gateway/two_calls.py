"""A thinking budget for a server that has none. The first call may generate as many tokens as the budget; if that ends
it inside the thought, the second goes on with the thought closed. So thinking never takes more tokens than the budget,
whoever counts: the server does, by `max_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm_puzzle.serving.gateway import events
from vllm_puzzle.serving.gateway.chat import CHAT_PATH, IDENTITY, STREAM_HEADERS, with_usage, write_last
from vllm_puzzle.serving.gateway.continuation import Continuation, Markers
from vllm_puzzle.serving.gateway.errors import GatewayError
from vllm_puzzle.serving.gateway.exchange import Exchange
from vllm_puzzle.serving.gateway.plan import Plan
from vllm_puzzle.serving.gateway.tally import Tally, finish_choice, reasoning_info, reasoning_tokens
from vllm_puzzle.serving.gateway.upstream import Upstream

# What cannot be put together from two replies.
REFUSED: tuple[str, ...] = (
    *("tools", "functions", "response_format", "logprobs", "top_logprobs", "echo"),
    *("documents", "chat_template", "continue_final_message"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "json_schema"),
)
LIMITS = ("max_completion_tokens", "max_tokens")


def check_two_calls(plan: Plan) -> None:
    """Raises GatewayError 400 naming what a budget in two calls cannot be joined with."""
    source = plan.wish.sources.get("budget", "budget")
    for name in REFUSED:
        if plan.body.get(name):
            raise GatewayError(
                400,
                f"`{name}`: found beside `{source}` on an upstream ({plan.kind.name}) that holds no budget itself, "
                f"allowed: one of the two",
                name,
            )
    if plan.body.get("n") not in (None, 1):
        raise GatewayError(400, f"`n`: found {plan.body['n']} beside `{source}` in two calls, allowed: 1", "n")
    if not isinstance(plan.body.get("messages"), list):
        raise GatewayError(400, "`messages`: found no list, allowed: a list", "messages")
    limit = limit_of(plan.body)
    if limit is not None and (type(limit) is not int or limit < 1):
        name = _limit_name(plan.body)
        raise GatewayError(400, f"`{name}`: found {limit!r}, allowed: an integer from 1", name)


def limit_of(body: Mapping[str, Any]) -> int | None:
    """The client's most tokens for thought and answer together, as written."""
    return next((body[name] for name in LIMITS if body.get(name) is not None), None)


def _limit_name(body: Mapping[str, Any]) -> str:
    return next((name for name in LIMITS if body.get(name) is not None), "max_tokens")


class TwoCalls:
    """One reply out of at most two. room: tokens that the context leaves for the second call of a request without a
    limit, None where the server fills it up itself.
    """

    def __init__(
        self, upstream: Upstream, plan: Plan, tally: Tally, continuation: Continuation, markers: Markers
    ) -> None:
        self._upstream, self._plan, self._continuation, self._markers = upstream, plan, continuation, markers
        self._usages: list[dict[str, Any] | None] = []
        self.room: int | None = None
        self.tally = tally
        tally.calls = 0
        self.identity: dict[str, Any] = {}

    async def answer(self, exchange: Exchange) -> None:
        """Streamed or whole, as the client asked."""
        wants_stream = self._plan.body.get("stream") is True
        options = self._plan.body.get("stream_options")
        async with aclosing(self._chunks(exchange)) as chunks:
            async for chunk in chunks:
                if wants_stream:
                    if not exchange.is_started:
                        await exchange.start(200, STREAM_HEADERS)
                    await exchange.write(events.encode(chunk))
        if wants_stream:
            wants_usage = isinstance(options, dict) and options.get("include_usage") is True
            await write_last(exchange, self._plan, self.tally, self.identity, wants_usage)
        else:
            await exchange.answer(200, json.dumps(self._whole(), ensure_ascii=False).encode())

    def _whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.tally.answer)}
        if self._plan.effective.is_visible:
            thought = "".join(self.tally.thought) or None
            message |= {"reasoning": thought, "reasoning_content": thought}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.tally.finish_reason}
        reply = {**self.identity, "object": "chat.completion", "choices": [choice], "usage": self.tally.usage}
        return {**reply, "reasoning_info": reasoning_info(self._plan, self.tally)}

    async def _chunks(self, exchange: Exchange) -> AsyncGenerator[dict[str, Any], None]:
        budget, limit = self._plan.effective.budget or 0, limit_of(self._plan.body)
        cap = budget if limit is None else min(budget, limit)
        used = 0
        if cap:
            async with aclosing(self._first(exchange, cap)) as chunks:
                async for chunk in chunks:
                    yield chunk
            used = self._end_of_first(cap)
            is_whole = self.tally.finish_reason != "length" or cap == limit
        else:
            self.tally.thinking_tokens = 0
            is_whole = False
        if not is_whole:
            left = self.room if limit is None else limit - used
            async with aclosing(self._second(exchange, left, is_first=not cap)) as chunks:
                async for chunk in chunks:
                    yield chunk
        self._add_up()
        yield self._chunk({}, self.tally.finish_reason)

    async def _first(self, exchange: Exchange, cap: int) -> AsyncGenerator[dict[str, Any], None]:
        body = {key: value for key, value in self._plan.body.items() if key not in LIMITS}
        body = with_usage({**body, _limit_name(self._plan.body): cap})
        async with aclosing(self._call(exchange, CHAT_PATH, body)) as chunks:
            async for chunk in chunks:
                self.identity.update({key: chunk[key] for key in IDENTITY if key in chunk})
                for choice in chunk["choices"]:
                    self.tally.see(choice)
                    finish_choice(choice, self._plan.effective.is_visible)
                    delta = choice.get("delta") or {}
                    if any(value is not None for value in delta.values()):
                        yield self._chunk(delta, None)

    def _end_of_first(self, cap: int) -> int:
        """Settle the thought's count; the tokens used."""
        tally, usage = self.tally, self._usages[0] or {}
        used = usage.get("completion_tokens")
        is_full = tally.finish_reason == "length"
        if not tally.thought and "".join(tally.answer).lstrip().startswith(self._markers.start):
            raise GatewayError(
                400,
                "budget: found an upstream that leaves thoughts in the answer, allowed: one with a reasoning parser",
            )
        tally.is_held = used is None or used <= cap
        tally.is_cut = is_full and bool(tally.thought) and not tally.answer and cap != limit_of(self._plan.body)
        count = reasoning_tokens(usage)
        if count or (count == 0 and not tally.thought):
            tally.thinking_tokens = count
        elif is_full and tally.thought and not tally.answer:
            # All of it was the thought, and its markers where the model wrote them, which only a tokenizer can tell.
            whole = used if isinstance(used, int) else cap
            tally.thinking_tokens = min(whole, tally.count("".join(tally.thought))) if tally.count else whole
        return used if isinstance(used, int) else cap

    async def _second(
        self, exchange: Exchange, left: int | None, is_first: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        tally = self.tally
        is_closed = is_first or tally.is_cut
        chat = {key: value for key, value in self._plan.body.items() if key not in LIMITS}
        body = self._continuation.body(chat, "".join(tally.thought), "".join(tally.answer), is_closed)
        name = "max_tokens" if self._continuation.path != CHAT_PATH else _limit_name(self._plan.body)
        body = with_usage(body if left is None else {**body, name: left})
        tally.finish_reason = None
        if is_first:
            yield self._chunk({"role": "assistant", "content": ""}, None)
        async with aclosing(self._call(exchange, self._continuation.path, body)) as chunks:
            async for chunk in chunks:
                self.identity = self.identity or {key: chunk[key] for key in IDENTITY if key in chunk}
                for choice in chunk["choices"]:
                    text = self._continuation.text(choice)
                    tally.finish_reason = choice.get("finish_reason") or tally.finish_reason
                    if text:
                        tally.answer.append(text)
                        yield self._chunk({"content": text}, None)

    async def _call(self, exchange: Exchange, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of one call that have choices; its usage is kept."""
        self.tally.calls += 1
        self._usages.append(None)
        async with self._upstream.post(path, exchange.passed_headers(), body) as response:
            async for batch in events.batches(response.aiter_raw()):
                for event in batch:
                    data = events.data_of(event)
                    chunk = events.parse(data) if data is not None else None
                    if chunk is None:
                        continue
                    if "error" in chunk:
                        raise GatewayError(502, f"upstream: {json.dumps(chunk['error'])[:300]}")
                    self._usages[-1] = chunk.get("usage") or self._usages[-1]
                    if events.choices_of(chunk):
                        yield chunk

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.identity, "object": "chat.completion.chunk", "choices": [choice]}

    def _add_up(self) -> None:
        """The usage of both calls: the prompt once, every generated token; None if a call did not tell."""
        if self.tally.calls == 2:
            second = self._usages[1] or {}
            details = second.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
            self.tally.second_prefill = {"prompt_tokens": second.get("prompt_tokens"), "cached_tokens": cached}
        if any(usage is None for usage in self._usages):
            self.tally.usage = None
            return
        told = [usage for usage in self._usages if usage is not None]
        prompt = told[0].get("prompt_tokens", 0)
        generated = sum(usage.get("completion_tokens", 0) for usage in told)
        self.tally.usage = {**told[0], "prompt_tokens": prompt, "completion_tokens": generated}
        self.tally.usage["total_tokens"] = prompt + generated
        if self.tally.thinking_tokens is not None:
            self.tally.usage["completion_tokens_details"] = {"reasoning_tokens": self.tally.thinking_tokens}
