"""The gateway as an HTTP server: what passes through, keys, limits, errors, a client that leaves, and its latency."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
import server
from scripted_upstream import MODEL, THOUGHT, Scripted, answer_to, serving
from vllm_puzzle.serving.gateway.app import Gateway
from vllm_puzzle.serving.gateway.service import Options
from vllm_puzzle.serving.gateway.upstream import Upstream

CLIENT = httpx.Client()
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
MAX_ADDED_MS = 1.0


@contextmanager
def gateway(upstream: Any, api_key: str | None = None, max_body: int = 10_000, **options: Any) -> Iterator[str]:
    with serving(upstream) as behind:
        app = Gateway(Upstream(behind, api_key), Options(**options), api_key, max_body)
        with serving(app, "on") as url:
            yield url


@contextmanager
def command(*arguments: str) -> Iterator[str]:
    """`vllm-puzzle gateway` in a process of its own."""
    port = server.free_port()
    process = subprocess.Popen(server.command("gateway", *arguments, "--port", str(port)), stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                CLIENT.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        assert process.wait(15) is not None


def test_everything_else_under_v1_passes_as_it_is() -> None:
    upstream = Scripted("vllm")
    with gateway(upstream) as url:
        assert CLIENT.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
        body = {"input": "x", "thinking_budget": "not ours to read"}
        passed = CLIENT.post(f"{url}/v1/embeddings?a=1&b=%20", json=body, headers={"x-mine": "7"}).json()
        assert passed == {"got": body, "query": "a=1&b=%20"}
        assert upstream.requests[-1][1]["x-mine"] == "7"
        missing = CLIENT.post(f"{url}/v1/nothing", json={})
        assert (missing.status_code, missing.json()) == (404, {"detail": "Not Found"})
        outside = CLIENT.get(f"{url}/metrics")
        assert (outside.status_code, outside.json()["error"]["type"]) == (404, "not_found_error")
        assert CLIENT.get(f"{url}/v1evil").status_code == 404


def test_a_path_keeps_its_escapes_and_leads_nowhere_else() -> None:
    seen: list[bytes] = []

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["raw_path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with gateway(echo, kind="vllm") as url:
        host, port = url.removeprefix("http://").split(":")
        for path, is_passed in (
            ("/v1/models/a%2Fb%3Fc", True),
            ("/v1/../metrics", False),
            ("/v1/%2e%2e/metrics", False),
            ("/v1/models/../../metrics", False),
        ):
            # A raw socket: clients tidy paths up.
            with socket.create_connection((host, int(port)), timeout=5) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                status = raw.recv(1000).split()[1]
            assert status == (b"204" if is_passed else b"404"), path
    assert seen == [b"/v1/models/a%2Fb%3Fc"]


def test_a_slash_at_the_end_is_no_way_around_the_dial() -> None:
    with gateway(Scripted("vllm")) as url:
        reply = CLIENT.post(f"{url}/v1/chat/completions/", json={**CHAT, "thinking_tokens": 8})
    assert reply.status_code == 400


def test_the_clients_key_is_asked_for_and_passed_on() -> None:
    upstream = Scripted("vllm")
    with gateway(upstream, api_key="right") as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
            for path in ("/v1/chat/completions", "/v1/models", "/v1/messages"):
                reply = CLIENT.post(url + path, json=CHAT, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["type"] == "authentication_error"
        assert upstream.requests == []
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="right")
        client.chat.completions.create(**CHAT)
        assert upstream.requests[-1][1]["authorization"] == "Bearer right"
        assert CLIENT.post(f"{url}/v1/messages", json={}, headers={"x-api-key": "right"}).status_code == 200
        assert CLIENT.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_body_that_is_no_json_object_or_too_large_is_one_line(path: str) -> None:
    upstream = Scripted("vllm")
    with gateway(upstream) as url:
        for raw, status in ((b"{", 400), (b"[1]", 400), (b"\xff", 400), (b"[" * 9_000, 400), (b"x" * 10_001, 413)):
            reply = CLIENT.post(url + path, content=raw)
            assert reply.status_code == status, reply.text
            assert "found" in reply.json()["error"]["message"]
    assert upstream.requests == []


ODD_BODIES: list[dict[str, Any]] = [
    {},
    {"messages": None},
    {"messages": [None, 3, {"role": 4}]},
    {"model": {"a": []}, "thinking_budget": 3},
    {"stream": "yes"},
    {"stream": True, "stream_options": 7},
    {"chat_template_kwargs": None, "think": True},
    {"max_tokens": "many", "thinking_budget": 3},
    {"max_tokens": True, "thinking_budget": 3},
    {"output_config": 5},
    {"nvext": None, "custom_params": None},
]


class Strict(Scripted):
    """Answers anything as a server answers what it cannot read."""

    async def _chat(self, body: dict[str, Any], receive: Any, send: Any) -> None:
        message = json.dumps({"error": {"message": "unreadable", "code": 422}}).encode()
        await send({"type": "http.response.start", "status": 422, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": message})


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_an_odd_body_is_never_the_gateways_fault(kind: str) -> None:
    with gateway(Strict(kind, has_budget=False)) as url:
        for body in ODD_BODIES:
            reply = CLIENT.post(f"{url}/v1/chat/completions", json=body)
            assert reply.status_code in (400, 422), (body, reply.text)
            assert reply.json()["error"]["message"]


def test_an_upstreams_error_keeps_its_status_and_text() -> None:
    with gateway(Scripted("vllm")) as url:
        for stream in (False, True):
            reply = CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, "colour": "red", "stream": stream})
            assert reply.status_code == 400
            assert reply.json()["error"]["type"] == "BadRequestError"
            assert "colour" in reply.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["vllm", "auto"])
def test_an_unreachable_upstream_is_a_502_in_one_line(kind: str) -> None:
    app = Gateway(Upstream(f"http://127.0.0.1:{server.free_port()}"), Options(kind=kind))
    with serving(app, "on") as url:
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/models"):
            reply = CLIENT.post(url + path, json=CHAT)
            assert (reply.status_code, reply.json()["error"]["type"]) == (502, "upstream_error")
            assert "ConnectError" in reply.json()["error"]["message"]
        assert CLIENT.get(f"{url}/health").status_code == 503


def test_an_upstream_that_starts_later_is_found_at_the_first_request() -> None:
    port = server.free_port()
    with serving(Gateway(Upstream(f"http://127.0.0.1:{port}"), Options()), "on") as url:
        assert CLIENT.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 502
        with serving(Scripted("nim"), port=port):
            reply = CLIENT.post(f"{url}/v1/chat/completions", json=CHAT)
            assert reply.json()["reasoning_info"]["upstream_kind"] == "nim"


class Breaking(Scripted):
    """Breaks its connection off after some events of a stream."""

    async def _send(
        self, send: Any, receive: Any, body: Any, tokens: Any, limit: Any, prompt: int, is_chat: bool
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        chunk = {"id": "x", "choices": [{"index": 0, "delta": {"reasoning": "th"}}]}
        data = f"data: {json.dumps(chunk)}\n\n".encode()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        raise ConnectionError("broken off, on purpose")


def test_a_stream_that_breaks_off_ends_in_an_error_that_the_client_sees() -> None:
    with gateway(Breaking("vllm"), budget_by="two-calls") as url:
        # Before a budget in two calls the begun reply is tried out, and that breaks off already.
        assert CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, "thinking_budget": 5}).status_code == 502
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        seen = ""
        with pytest.raises(openai.APIError, match="found no whole answer"):
            for chunk in client.chat.completions.create(**CHAT, stream=True):
                seen += chunk.choices[0].delta.reasoning  # type: ignore[attr-defined]
        assert seen == "th"


# Two calls are streams behind, whatever the client asked for.
@pytest.mark.parametrize(
    ("stream", "fields"),
    [(True, {}), *((s, {"thinking_budget": n}) for s in (True, False) for n in (2, 200))],
)
def test_a_client_that_leaves_stops_the_upstream(stream: bool, fields: dict[str, Any]) -> None:
    upstream = Scripted("vllm", thought=THOUGHT * 20, delay=0.01)
    with gateway(upstream, budget_by="two-calls") as url:
        CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, "thinking_budget": 1, "max_tokens": 2})
        upstream.was_left.clear()
        body = {**CHAT, **fields, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                received = reply.iter_raw()
                for _ in range(6):
                    next(received)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
        assert upstream.was_left.wait(5)
        sent = upstream.sent
        time.sleep(0.1)
        assert upstream.sent == sent, "it goes on generating"


def test_a_client_that_leaves_a_whole_reply_stops_the_upstream() -> None:
    left: list[bool] = []

    class Slow(Scripted):
        async def _chat(self, body: dict[str, Any], receive: Any, send: Any) -> None:
            left.append((await receive())["type"] == "http.disconnect")

    with gateway(Slow("vllm")) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=0.2)
        deadline = time.monotonic() + 5
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
    assert left == [True]


def test_the_official_clients_read_both_kinds_of_reply() -> None:
    with gateway(Scripted("vllm")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        reply: Any = client.chat.completions.create(**CHAT, reasoning_effort="low")
        assert (reply.choices[0].message.reasoning_content, reply.reasoning_info["end_reason"]) == (THOUGHT, "natural")
        *chunks, last = client.chat.completions.create(**CHAT, stream=True, extra_body={"thinking_budget": 3})
        text: Any = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer_to(THOUGHT[:3])
        info: Any = last
        assert info.reasoning_info["end_reason"] == "budget"
        claude = anthropic.Anthropic(base_url=url, api_key="none")
        with pytest.raises(anthropic.BadRequestError, match="unknown reasoning field"):
            claude.messages.create(model=MODEL, max_tokens=9, messages=[], extra_body={"thinking_tokens": 8})


def test_a_line_end_of_any_kind_and_a_split_anywhere_are_one_event() -> None:
    import asyncio

    from vllm_puzzle.serving.gateway import events

    whole = 'data: {"a": "ä"}\r\n\r\n: alive\n\nevent: x\ndata: 1\n\ndata: [DONE]\n\n'.encode()

    async def split_at(size: int) -> list[bytes]:
        async def parts() -> Any:
            for start in range(0, len(whole), size):
                yield whole[start : start + size]

        return [event async for batch in events.batches(parts()) for event in batch]

    expected = ['data: {"a": "ä"}\n\n'.encode(), b": alive\n\n", b"event: x\ndata: 1\n\n", b"data: [DONE]\n\n"]
    for size in range(1, len(whole) + 1):
        assert asyncio.run(split_at(size)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--upstream", "localhost:8000"], "`--upstream`: found 'localhost:8000', allowed: http://host:port"),
        (["--upstream", "http://h", "--tokenizer", "/nowhere"], "`--tokenizer`: found '/nowhere', allowed: a folder"),
        (["--upstream", "http://h", "--upstream-kind", "openai", "--budget-by", "server"], "which has no budget"),
        (["--upstream", "http://h", "--port", "70000"], "allowed: a free address"),
        (["--upstream", "http://h", "--think-markers", "", "x"], "found an empty marker"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(server.command("gateway", *arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def delays_ms(url: str) -> list[float]:
    """How long each chunk was on its way, by the machine's one monotonic clock."""
    found = []
    with CLIENT.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        for line in reply.iter_lines():
            arrived = time.monotonic_ns()
            if '"sent_at"' in line:
                found.append((arrived - json.loads(line.removeprefix("data: "))["sent_at"]) / 1e6)
    return found


def test_a_chunk_is_not_held_up_by_a_millisecond() -> None:
    upstream = Scripted("vllm", thought=THOUGHT * 8, delay=0.003, stamps=True)
    added = []
    with serving(upstream) as behind, command("--upstream", behind) as url:
        for _ in range(3):  # in turns, so that a busy moment of the machine meets both
            direct, through = delays_ms(behind), delays_ms(url)
            assert len(direct) == len(through) > 300
            at = [statistics.quantiles(delays, n=100) for delays in (direct, through)]
            added.append((at[1][49] - at[0][49], at[1][98] - at[0][98]))
    best = min(added)
    print(f"\nadded to each chunk, ms (median, p99), three rounds: {[(round(a, 3), round(b, 3)) for a, b in added]}")
    assert best[0] <= MAX_ADDED_MS
