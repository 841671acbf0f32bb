"""`vllm-puzzle bench mock`: an OpenAI-compatible server of known behaviour, to try a benchmark on.

Every step of a reply leaves at a time that is known beforehand (`mock_behaviour.py`), so that every metric of a run has
a closed form. Plain ASGI, served by uvicorn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from vllm_puzzle.bench.efficiency.mock_behaviour import (
    ANSWER,
    COMMENT,
    DROP,
    EMPTY,
    ERROR,
    FINISH,
    ROLE,
    SILENT,
    THINKING,
    TOOL,
    Behaviour,
    Script,
    Step,
    warmed,
)
from vllm_puzzle.model_configs.schema import ConfigError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
CHAT = "/v1/chat/completions"


class Dropped(Exception):
    """The connection is to break off now."""


class Mock:
    """The server as an ASGI application. `requests` holds the bodies that came, in their order.

    on_death: called when `dies_after` is reached; the connections break off in any case.
    """

    def __init__(self, behaviour: Behaviour | None = None, on_death: Callable[[], None] | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.on_death = on_death
        self.requests: list[dict[str, Any]] = []
        self.running = 0
        self.generated = 0
        self._prompt = self._cached = 0
        self._seen: set[str] = set()
        self._slots: asyncio.Semaphore | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path == CHAT and scope["method"] == "POST":
            await self._chat(await _body(receive), send)
        elif path == "/v1/models":
            await _reply(send, 200, {"object": "list", "data": [{"id": self.behaviour.model, "owned_by": "mock"}]})
        elif path == "/version":
            await _reply(send, 200, {"version": "mock"})
        elif path == "/metrics":
            await _reply(send, 200, self.metrics())
        else:
            await _reply(send, 200 if path == "/health" else 404, {})

    @property
    def is_dead(self) -> bool:
        """Whether the last request that it answers has come."""
        last = self.behaviour.dies_after
        return last is not None and len(self.requests) > last

    async def _chat(self, raw: bytes, send: Send) -> None:
        ordinal = len(self.requests)
        body = json.loads(raw)
        self.requests.append(body)
        if self.is_dead and self.on_death is not None:
            self.on_death()
        if self.is_dead:
            raise Dropped
        try:
            script = self.behaviour.script(body, ordinal)
        except (ValueError, TypeError) as error:
            script = Script(status=400, end_reason=str(error))
        if script.status != 200:
            message = script.end_reason or f"mock: {script.status}"
            await _reply(send, script.status, {"error": {"message": message, "code": script.status}})
            return
        key = json.dumps([body.get("cache_salt"), body.get("messages")])
        if self.behaviour.has_cache and key in self._seen:
            script = warmed(script)
        self._seen.add(key)
        if self._slots is None and self.behaviour.slots is not None:
            self._slots = asyncio.Semaphore(self.behaviour.slots)
        self.running += 1
        try:
            async with self._slots or nullcontext():
                await self._play(script, Wire(self.behaviour, body, script), send)
        finally:
            self.running -= 1

    async def _play(self, script: Script, wire: Wire, send: Send) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for step in script.steps:
            due += step.delay
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if step.kind == DROP:
                raise Dropped
            self.generated += step.tokens
            for event in wire.events(step):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        self._prompt += script.prompt_tokens
        self._cached += script.cached_tokens
        await send({"type": "http.response.body", "body": wire.end(), "more_body": False})

    def metrics(self) -> str:
        """Prometheus text: the prefix cache, and speculative decoding as if it had made every token."""
        label = f'{{model_name="{self.behaviour.model}"}}'
        counters: dict[str, float] = {
            f"vllm:prefix_cache_queries_total{label}": self._prompt,
            f"vllm:prefix_cache_hits_total{label}": self._cached,
        }
        accept = self.behaviour.accept
        if accept:
            # Each draft adds the tokens it got accepted and the one that the model itself samples.
            drafts = self.generated / (1 + sum(accept))
            counters[f"vllm:spec_decode_num_drafts_total{label}"] = drafts
            counters[f"vllm:spec_decode_num_draft_tokens_total{label}"] = drafts * len(accept)
            counters[f"vllm:spec_decode_num_accepted_tokens_total{label}"] = drafts * sum(accept)
            for position, share in enumerate(accept):
                name = f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{model_name="{self.behaviour.model}",'
                counters[f'{name}position="{position}"}}'] = drafts * share
        return "".join(f"{name} {value!r}\n" for name, value in counters.items())


class Wire:
    """The steps of one reply as server-sent events."""

    def __init__(self, behaviour: Behaviour, body: dict[str, Any], script: Script) -> None:
        options = body.get("stream_options") or {}
        self.behaviour, self.script = behaviour, script
        self.has_usage = bool(options.get("include_usage")) and behaviour.usage != "none"
        self.is_continuous = self.has_usage and bool(options.get("continuous_usage_stats"))
        self.is_continuous &= behaviour.usage == "continuous"
        self.counts = {THINKING: 0, ANSWER: 0, TOOL: 0, SILENT: 0, FINISH: 0}
        self.is_in_thought = False

    def events(self, step: Step) -> list[bytes]:
        """What leaves at a step; nothing for one that no chunk shows."""
        if step.kind in self.counts:
            self.counts[step.kind] += step.tokens
        if step.kind == COMMENT:
            return [b": ping\n\n"]
        if step.kind == ERROR:
            return [_event({"error": {"message": step.text or "mock: failed", "code": 500}})]
        if step.kind == SILENT and not (self.is_in_thought and self.behaviour.thought_field == "inline"):
            return []
        delta = {ROLE: {"role": "assistant", "content": ""}, EMPTY: {}, FINISH: {}}.get(step.kind)
        delta = self._delta(step) if delta is None else delta
        reason = step.text if step.kind == FINISH else None
        chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        if self.is_continuous:
            chunk["usage"] = self.usage()
        if reason and self.behaviour.has_info:
            chunk["reasoning_info"] = self._info()
        return [_event(chunk)]

    def end(self) -> bytes:
        """The counts, where they were asked for, and the last event."""
        done = b"data: [DONE]\n\n"
        return _event({"choices": [], "usage": self.usage(is_final=True)}) + done if self.has_usage else done

    def _delta(self, step: Step) -> dict[str, Any]:
        if step.kind == TOOL:
            function = {"name": "f", "arguments": step.text}
            return {"tool_calls": [{"index": 0, "function": function}]}
        field = self.behaviour.thought_field
        if field == "inline":
            tag = "<think>" if step.kind == THINKING and not self.is_in_thought else ""
            self.is_in_thought = step.kind == THINKING
            return {"content": tag + step.text}
        if step.kind == ANSWER:
            return {"content": step.text}
        names = ("reasoning", "reasoning_content") if field == "both" else (field,)
        return dict.fromkeys(names, step.text)

    def usage(self, is_final: bool = False) -> dict[str, Any]:
        """Counts so far, as vLLM words them."""
        output, prompt = sum(self.counts.values()), self.script.prompt_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }
        if self.behaviour.is_counted:
            thinking = 0 if self.behaviour.miscounts else self.counts[THINKING]
            usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
        if is_final:
            usage["prompt_tokens_details"] = {"cached_tokens": self.script.cached_tokens}
        return usage

    def _info(self) -> dict[str, Any]:
        answer = self.counts[ANSWER] + self.counts[TOOL] + self.counts[FINISH]
        thinking = self.counts[THINKING]
        return {"thinking_tokens": thinking, "answer_tokens": answer, "end_reason": self.script.end_reason}


def _event(chunk: dict[str, Any]) -> bytes:
    head = {"id": "mock", "object": "chat.completion.chunk", "created": 0, "model": "mock"}
    return b"data: " + json.dumps(head | chunk, separators=(",", ":")).encode() + b"\n\n"


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _reply(send: Send, status: int, body: dict[str, Any] | str) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    headers = [(b"content-type", b"text/plain" if isinstance(body, str) else b"application/json")]
    headers.append((b"content-length", str(len(data)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def behaviour_from(path: Path | None, overrides: Sequence[str] = ()) -> Behaviour:
    """Settings from a YAML file and from `key=value` words, of which the latter win. Raises ConfigError."""
    settings: Any = {}
    if path is not None:
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}, allowed: a YAML file of settings") from None
    for word in overrides:
        key, found, value = word.partition("=")
        if not found:
            raise ConfigError(f"mock, setting: found {word!r}, allowed: KEY=VALUE")
        settings = {**settings, key: yaml.safe_load(value)}
    allowed = Behaviour.__dataclass_fields__
    unknown = set(settings) - set(allowed) if isinstance(settings, dict) else {"no mapping"}
    if unknown:
        raise ConfigError(f"mock, settings: found {sorted(unknown)}, allowed: {', '.join(allowed)}")
    tuples: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    try:
        return Behaviour(**tuples)
    except TypeError as error:
        raise ConfigError(f"mock, settings: found {error}, allowed: numbers, and lists for ranges") from None


def mock(argv: Sequence[str]) -> int:
    """`vllm-puzzle bench mock`: serve until it is stopped."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="vllm-puzzle bench mock", description="a server of known behaviour")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--behaviour", type=Path, help="YAML file of settings")
    keys = ", ".join(Behaviour.__dataclass_fields__)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"one setting: {keys}")
    options = parser.parse_args(argv)
    # As a crash: nothing is told to anybody.
    app = Mock(behaviour_from(options.behaviour, options.set), on_death=lambda: os._exit(1))
    uvicorn.run(app, host=options.host, port=options.port, log_level="critical", lifespan="off")
    return 0
