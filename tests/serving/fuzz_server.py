"""Fuzz the real server: `python tests/serving/fuzz_server.py NUMBER [START]` sends that many generated bodies."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from fuzz_bodies import CHAT, MESSAGES, UNREADABLE, Case, generate
from fuzz_oracle import BadField, check_error, check_info, read_simply, seen

CEILING = 40
FLAGS = (f"--puzzle-reasoning.ceiling={CEILING}",)
AT_ONCE = 12
# vLLM 0.32's own: `structured_outputs` that is no object (its validators in openai/chat_completion/protocol.py call
# `.get`), with or without a reasoning field.
STOCK = tuple(f"'{kind}' object has no attribute 'get'" for kind in ("bool", "int", "float", "str", "list"))


async def fuzz(url: str, cases: list[Case]) -> Counter[str]:
    """Send the cases, some at once, and check each reply. Returns how many ended in which way.

    Raises ExceptionGroup with one AssertionError per case that fails.
    """
    outcomes, faults, todo = Counter[str](), [], iter(cases)

    async def work(client: httpx.AsyncClient) -> None:
        for case in todo:
            try:
                outcomes[await check(client, case)] += 1
            except Exception as error:
                error.add_note(str(case)[:2000])
                faults.append(error)

    # Each request on its own connection: one that is closed is then the server's doing.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(AT_ONCE)))
    if faults:
        raise ExceptionGroup(f"{len(faults)} of {len(cases)}", faults)
    return outcomes


async def check(client: httpx.AsyncClient, case: Case) -> str:
    """Send one case and check its reply; the kind of outcome."""
    reply = await client.post(case.path, content=case.raw, headers={"content-type": case.content_type})
    try:
        wanted = read_simply(case)
    except BadField:
        # vLLM's own check of the content type comes later, so that all of these are ours.
        check_error(case, reply.status_code, reply.json(), is_ours=True)
        return "refused"
    if reply.status_code == 500 and any(known in reply.text for known in STOCK):
        assert "structured_outputs" in (seen(case) or {})
        return "vLLM's own"
    if reply.status_code != 200:
        check_error(case, reply.status_code, reply.json(), is_ours=False)
        is_history = wanted is not None and wanted.has_history
        assert not case.is_clean or is_history, f"{case.path} must be served: {reply.text[:500]}"
        return "not readable" if case.fault in UNREADABLE else "refused behind"
    body = seen(case)
    assert wanted is not None and body is not None, "a body that is none cannot be served"
    is_stream = reply.headers["content-type"].startswith("text/event-stream")
    if is_stream and await is_failed(case, reply.text):
        return "failed in the stream"
    texts, infos = (streamed if is_stream else whole)(case.path, reply.text)
    for info in infos:
        check_info(info, wanted, CEILING)
    assert infos or body.get("background"), "every reply tells what was done"
    if not is_stream:
        return "silent" if wanted.is_silent else "done"
    if is_greedy(body):
        await check_same_text(client, case, body, texts)
        return "streamed, same text"
    return "streamed"


def is_greedy(body: dict[str, Any]) -> bool:
    return body["temperature"] == 0 and body.get("n") in (None, 1)


async def is_failed(case: Case, text: str) -> bool:
    """Whether the stream ends in an error, as a request does that vLLM refuses after its head; never in a 5xx one."""
    errors = [event["error"] for event in events(text) if isinstance(event.get("error"), dict)]
    for error in errors:
        assert int(error.get("code") or 400) < 500, error
        assert error.get("type") not in ("internal_error", "InternalServerError", "api_error"), error
    return bool(errors)


async def check_same_text(client: httpx.AsyncClient, case: Case, body: dict[str, Any], texts: Any) -> None:
    raw = json.dumps({**body, "stream": False, "stream_options": None}).encode()
    reply = await client.post(case.path, content=raw, headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    said = whole(case.path, reply.text)[0]
    assert said == texts, f"whole {said}, streamed {texts}"


Said = tuple[tuple[str, str], list[dict[str, Any]]]


def whole(path: str, text: str) -> Said:
    """((thinking, answer), reasoning_info objects) of a whole reply."""
    body = json.loads(text)
    infos = [body["reasoning_info"]] if "reasoning_info" in body else []
    if path == CHAT:
        message = body["choices"][0]["message"]
        return (message["reasoning"] or "", message["content"] or ""), infos
    if path == MESSAGES:
        blocks = body["content"]
        said = ["".join(block.get(kind, "") for block in blocks) for kind in ("thinking", "text")]
        return (said[0], said[1]), infos
    parts = [
        (item["type"] == "reasoning", part.get("text", ""))
        for item in body["output"]
        for part in item.get("content") or []
    ]
    return ("".join(t for is_thought, t in parts if is_thought), "".join(t for is_t, t in parts if not is_t)), infos


def events(text: str) -> list[dict[str, Any]]:
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def streamed(path: str, text: str) -> Said:
    """The same of a stream."""
    thinking, answer, infos = "", "", []
    for event in events(text):
        for holder in (event, event.get("response")):
            if isinstance(holder, dict) and "reasoning_info" in holder:
                infos.append(holder["reasoning_info"])
        if path == CHAT:
            for choice in event.get("choices") or []:
                if choice["index"] == 0:
                    thinking += choice["delta"].get("reasoning") or ""
                    answer += choice["delta"].get("content") or ""
        elif path == MESSAGES:
            delta = event.get("delta") or {}
            thinking += delta.get("thinking", "")
            answer += delta.get("text", "")
        else:
            kind = event.get("type")
            thinking += event["delta"] if kind == "response.reasoning_text.delta" else ""
            answer += event["delta"] if kind == "response.output_text.delta" else ""
    # Only the last tells everything: choices end one after the other.
    return (thinking, answer), infos[-1:]


async def check_completions(url: str) -> None:
    """The path without a dial: vLLM's own field, under the ceiling."""
    prompt = "12+30-5=<think>"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for budget in (0, 3, CEILING, CEILING + 1, 500, -1, 2**40, 10**30, "9", None, 1.5, [], True):
            for extra in ({}, {"vllm_xargs": {"puzzle_thinking": {"budget": None, "grace": 0, "loop": None}}}):
                body = {"model": "pocket-puzzle", "prompt": prompt, "max_tokens": 90, "temperature": 0}
                reply = await client.post("/v1/completions", json={**body, "thinking_token_budget": budget, **extra})
                if reply.status_code != 200:
                    check_error(Case("/v1/completions", b""), reply.status_code, reply.json(), is_ours=False)
                    continue
                limit = budget if type(budget) is int and 0 <= budget < CEILING else CEILING
                thought = reply.json()["choices"][0]["text"].partition("</think>")[0]
                # One character is one token of this model.
                assert len(thought) <= limit, (budget, thought)


def run(number: int, start: int, url: str) -> Counter[str]:
    """Generate, send, check."""
    asyncio.run(check_completions(url))
    return asyncio.run(fuzz(url, generate(number, start)))


def main(argv: list[str]) -> int:
    """Print the outcomes, or each failure."""
    import server

    number, start = int(argv[0]), int(argv[1]) if len(argv) > 1 else 0
    with tempfile.TemporaryDirectory() as folder, server.running(Path(folder) / "log.txt", *FLAGS) as url:
        began = time.monotonic()
        try:
            outcomes = run(number, start, url)
        except ExceptionGroup as group:
            for error in group.exceptions:
                print(f"{type(error).__name__}: {str(error)[:1500]}\n    {error.__notes__[0]}\n")
            print(group)
            return 1
        finally:
            if "Traceback" in (log := (Path(folder) / "log.txt").read_text()):
                print(log[log.index("Traceback") - 300 :][:6000])
    print(f"{number} bodies in {time.monotonic() - began:.0f} s: {dict(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
