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
from fuzz_oracle import MEANS, OBJECTS, BadField, check_error, check_info, read_simply, seen

CEILING = 40
FLAGS = (f"--puzzle-reasoning.ceiling={CEILING}",)
AT_ONCE = 12
TRIES = 3


def is_stocks_own(body: dict[str, Any], error: dict[str, Any]) -> bool:
    """Whether vLLM 0.32 answers this 500 without us and without any reasoning field too (both seen there).

    `structured_outputs` that is no object: a validator in openai/chat_completion/protocol.py calls its `.get`. A
    grammar beside `bad_words` or `allowed_token_ids` that leave it no token: the engine ends the request.
    """
    outputs = body.get("structured_outputs")
    if outputs is not None and not isinstance(outputs, dict):
        return str(error["message"]).endswith("object has no attribute 'get'")
    has_grammar = bool(outputs or body.get("response_format") or body.get("tool_choice"))
    has_ban = bool(body.get("bad_words") or body.get("allowed_token_ids"))
    return has_grammar and has_ban and error["message"] == "Internal server error"


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
    if reply.status_code == 500 and is_stocks_own(seen(case) or {}, reply.json()["error"]):
        return "vLLM's own"
    if reply.status_code != 200:
        check_error(case, reply.status_code, reply.json(), is_ours=False)
        may_be_refused = not case.is_clean or (wanted is not None and wanted.has_history) or has_others(seen(case))
        assert may_be_refused, f"{case.path} must be served: {reply.text[:500]}"
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


def has_others(body: dict[str, Any] | None) -> bool:
    """Whether an object that holds a reasoning field also holds what only vLLM knows to be right or wrong."""
    inner = [(name, key) for name, value in (body or {}).items() if isinstance(value, dict) for key in value]
    return any(f"{name}.{key}" not in MEANS and f"{name}.{key}" not in OBJECTS for name, key in inner)


def is_greedy(body: dict[str, Any]) -> bool:
    """Whether its stream must be its whole reply. After an ignored end of the text vLLM's parsers show the special
    tokens in a stream only, also without us."""
    return body["temperature"] == 0 and body.get("n") in (None, 1) and not body.get("ignore_eos")


async def is_failed(case: Case, text: str) -> bool:
    """Whether the stream ends in an error, as a request does that vLLM refuses after its head; never in a 5xx one."""
    errors = [event["error"] for event in events(text) if isinstance(event.get("error"), dict)]
    for error in errors:
        if is_stocks_own(seen(case) or {}, error):
            continue
        assert int(error.get("code") or 400) < 500, error
        assert error.get("type") not in ("internal_error", "InternalServerError", "api_error"), error
    return bool(errors)


async def check_same_text(client: httpx.AsyncClient, case: Case, body: dict[str, Any], texts: Any) -> None:
    """Ask for the whole reply. Both again where they differ: in another batch the model's last bits are others, and a
    near tie can fall the other way; what is wrong with the text stays."""
    raw = json.dumps({**body, "stream": False, "stream_options": None}).encode()
    headers = {"content-type": "application/json"}
    for _ in range(TRIES):
        reply = await client.post(case.path, content=raw, headers=headers)
        assert reply.status_code == 200, reply.text
        if (said := whole(case.path, reply.text)[0]) == texts:
            return
        reply = await client.post(case.path, content=case.raw, headers={"content-type": case.content_type})
        again, texts = texts, streamed(case.path, reply.text)[0]
        if said == texts:
            return
    raise AssertionError(f"whole {said}, streamed {again} and {texts}")


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
    print(f"{number} bodies in {time.monotonic() - began:.0f} s: {dict(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
