"""A scripted server in each kind's dialect: one character is one token, the thought is fixed, and the answer tells how
long a thought it stands after. It takes only fields that its kind has, and records what it got.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

THOUGHT = "first this, then that; so it is done."
COMMON = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "n"}
COMMON |= {"stop", "tools", "response_format", "logprobs", "seed"}
OWN_FIELDS: dict[str, set[str]] = {
    "vllm": {"reasoning_effort", "chat_template_kwargs", "thinking_token_budget", "continue_final_message"}
    | {"add_generation_prompt", "chat_template"},
    "trtllm": {"chat_template_kwargs", "thinking_token_budget"},
    "sglang": {"reasoning_effort", "chat_template_kwargs", "custom_params", "continue_final_message"}
    | {"separate_reasoning"},
    "nim": {"chat_template_kwargs", "nvext"},
    "llamacpp": {"chat_template_kwargs", "thinking_budget_tokens", "reasoning_effort"},
    "openai": {"reasoning_effort"},
}
MODEL = "scripted"


class Scripted:
    """ASGI app. has_budget: SGLang's strict thinking, vLLM's reasoning parser set up for budgets. keeps_thought: the
    chat template keeps the thought of a begun reply. opens: the generation prompt opens the thought.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind = kind
        self.thought: str = options.get("thought", THOUGHT)
        self.has_budget: bool = options.get("has_budget", True)
        self.keeps_thought: bool = options.get("keeps_thought", True)
        self.opens: bool = options.get("opens", True)
        self.tells_usage: bool = options.get("tells_usage", True)
        self.template: str = options.get("template", "{{ messages }}{{ enable_thinking }}{{ reasoning_effort }}")
        self.tokenizer: Any = options.get("tokenizer")
        self.delay: float = options.get("delay", 0.0)
        self.stamps = bool(options.get("stamps"))
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.sent = 0
        self.was_left = threading.Event()

    def chats(self) -> list[dict[str, Any]]:
        return [body for path, _, body in self.requests if path == "/v1/chat/completions"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        path = scope["path"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["method"] == "GET":
            found = self._describe(path)
            await reply(send, 404 if found is None else 200, found if found is not None else {"detail": "Not Found"})
            return
        body = json.loads(raw)
        self.requests.append((path, headers, body))
        if path == "/v1/chat/completions":
            await self._chat(body, receive, send)
        elif path == "/v1/completions":
            await self._complete(body, receive, send)
        elif path in ("/v1/responses", "/v1/messages", "/v1/embeddings"):
            await reply(send, 200, {"got": body, "query": scope["query_string"].decode()})
        else:
            await reply(send, 404, {"detail": "Not Found"})

    def _describe(self, path: str) -> Any:
        owners = {"vllm": "vllm", "trtllm": "tensorrt_llm", "sglang": "sglang", "llamacpp": "llamacpp"}
        card: dict[str, Any] = {"id": MODEL, "object": "model", "owned_by": owners.get(self.kind, "someone")}
        if self.kind in ("vllm", "sglang"):
            card["max_model_len"] = 1024
        routes: dict[str, dict[str, Any]] = {
            "vllm": {"/version": {"version": "0.32.0"}, "/health": {}},
            "trtllm": {"/version": {"version": "1.2.0"}, "/health": {}},
            "sglang": {"/get_server_info": {"enable_strict_thinking": self.has_budget}, "/health": {}},
            "nim": {"/v1/metadata": {"version": "2.0"}, "/v1/health/ready": {"message": "ready"}},
            "llamacpp": {"/props": {"chat_template": self.template}, "/health": {}},
            "openai": {},
        }
        return {"/v1/models": {"object": "list", "data": [card]}, **routes[self.kind]}.get(path)

    async def _chat(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        strange = set(body) - COMMON - OWN_FIELDS[self.kind]
        if strange:
            await refuse(send, f"fields that {self.kind} does not have: {sorted(strange)}")
            return
        budget = {
            "vllm": lambda: body.get("thinking_token_budget"),
            "trtllm": lambda: body.get("thinking_token_budget"),
            "sglang": lambda: (body.get("custom_params") or {}).get("thinking_budget"),
            "nim": lambda: (body.get("nvext") or {}).get("max_thinking_tokens"),
            "llamacpp": lambda: body.get("thinking_budget_tokens"),
            "openai": lambda: None,
        }[self.kind]()
        if budget is not None and not self.has_budget:
            await refuse(send, "thinking_token_budget is set but the server has no reasoning config")
            return
        switch = (body.get("chat_template_kwargs") or {}).get("enable_thinking")
        is_on = body.get("reasoning_effort") != "none" if switch is None else switch
        length = sum(len(message["content"] or "") for message in body["messages"])
        if body.get("continue_final_message"):
            begun = body["messages"][-1]["content"]
            if not self.keeps_thought:
                await refuse(send, "continue_final_message: the final message does not appear")
                return
            if self.kind == "sglang" and self.opens:
                assert "<think>" not in begun, "SGLang writes this after the prompt, which has opened the thought"
                begun = "<think>" + begun
            tokens = self._after(begun)
        else:
            tokens = self._from_start(is_on, budget)
        if body.get("separate_reasoning") is False:
            tokens = [("content", text or kind) for kind, text in tokens]
            if not self.opens and not body.get("continue_final_message"):
                tokens.insert(0, ("content", "<think>"))
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        await self._send(send, receive, body, tokens, limit, length, is_chat=True)

    async def _complete(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        text = self.tokenizer.decode(body["prompt"], skip_special_tokens=False)
        begun = text[text.rindex("<|assistant|>") + len("<|assistant|>") :]
        limit = body.get("max_tokens", 16)
        await self._send(send, receive, body, self._after(begun), limit, len(body["prompt"]), is_chat=False)

    def _from_start(self, is_on: bool, budget: int | None) -> list[tuple[str, str]]:
        thought = self.thought[:budget] if is_on else ""
        name = "reasoning" if self.kind == "vllm" else "reasoning_content"
        mark = [("mark", "")] if is_on else []
        return [(name, c) for c in thought] + mark + [("content", c) for c in answer_to(thought)] + [("end", "")]

    def _after(self, begun: str) -> list[tuple[str, str]]:
        """How it goes on after `<think>…</think>…`; the answer depends on the thought that is there."""
        thought, mark, said = begun.partition("</think>")
        assert mark and thought.startswith("<think>"), begun
        whole = answer_to(thought.removeprefix("<think>"))
        assert whole.startswith(said), (whole, said)
        return [("content", c) for c in whole[len(said) :]] + [("end", "")]

    async def _send(
        self, send: Any, receive: Any, body: Any, tokens: Any, limit: int | None, prompt: int, is_chat: bool
    ) -> None:
        kept = tokens if limit is None else tokens[:limit]
        reason = "stop" if len(kept) == len(tokens) else "length"
        thinking = sum(kind.startswith("reasoning") for kind, _ in kept)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": len(kept)}
        usage["total_tokens"] = prompt + len(kept)
        if self.kind == "vllm" and is_chat:
            usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
        head = {"id": "x-1", "created": 5, "model": body.get("model")}
        if not body.get("stream"):
            message: dict[str, Any] = {"role": "assistant", "content": None}
            for kind, text in kept:
                if text:
                    message[kind] = (message.get(kind) or "") + text
            choice = {"index": 0, "message": message, "finish_reason": reason}
            await reply(send, 200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})
            return
        headers = [(b"content-type", b"text/event-stream"), (b"x-upstream", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.ensure_future(receive())
        try:
            if is_chat:
                await event(send, {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for kind, text in kept:
                if self.delay:
                    await asyncio.sleep(self.delay)
                if gone.done():
                    self.was_left.set()
                    return
                self.sent += 1
                if text:
                    choice = {"index": 0, "delta": {kind: text}} if is_chat else {"index": 0, "text": text}
                    stamp = {"sent_at": time.monotonic_ns()} if self.stamps else {}
                    await event(send, {**head, "choices": [{**choice, "finish_reason": None}], **stamp})
            last = {"index": 0, "delta": {}} if is_chat else {"index": 0, "text": ""}
            await event(send, {**head, "choices": [{**last, "finish_reason": reason}]})
            if self.tells_usage and (body.get("stream_options") or {}).get("include_usage"):
                await event(send, {**head, "choices": [], "usage": usage})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        finally:
            gone.cancel()


def answer_to(thought: str) -> str:
    return f"after {len(thought)} tokens of thought"


async def event(send: Any, chunk: Any) -> None:
    await send({"type": "http.response.body", "body": f"data: {json.dumps(chunk)}\n\n".encode(), "more_body": True})


async def reply(send: Any, status: int, content: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def refuse(send: Any, message: str) -> None:
    await reply(send, 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})


@contextmanager
def serving(app: Any, lifespan: str = "off", port: int = 0) -> Iterator[str]:
    """An ASGI app on a loopback port, in a thread of its own; the URL."""
    config = uvicorn.Config(app, port=port, log_level="critical", lifespan=lifespan, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
