"""The gateway as an ASGI app: which path goes where, who may come in, what an error looks like."""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import sys
from typing import Any

from vllm_puzzle.serving.gateway.chat import CHAT_PATH
from vllm_puzzle.serving.gateway.errors import MESSAGES_PATH, GatewayError, UpstreamRefusal
from vllm_puzzle.serving.gateway.exchange import (
    MAX_BODY_BYTES,
    Disconnected,
    Exchange,
    Receive,
    Scope,
    Send,
    kept_headers,
)
from vllm_puzzle.serving.gateway.other_apis import RESPONSES_PATH, translate
from vllm_puzzle.serving.gateway.service import Options, Service
from vllm_puzzle.serving.gateway.upstream import Upstream

PASSED = re.compile(r"/v1(/|$)")


def say(text: str) -> None:
    """One line for the person who started it."""
    print(f"[vllm-puzzle gateway] {text}", file=sys.stderr, flush=True)


class Gateway:
    """ASGI app in front of one upstream. api_key: what clients must present; it goes on to the upstream."""

    def __init__(
        self, upstream: Upstream, options: Options, api_key: str | None = None, max_body: int = MAX_BODY_BYTES
    ) -> None:
        self._upstream, self._key, self._max_body = upstream, api_key, max_body
        self._service = Service(upstream, options, say)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            exchange = Exchange(scope, receive, send, self._max_body)
            try:
                await self._serve(exchange)
            except Disconnected:
                pass
            except (GatewayError, UpstreamRefusal) as error:
                await exchange.refuse(error)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._service.facts()
                except GatewayError as error:
                    say(f"{error}; asked again at the first request")
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._upstream.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _serve(self, exchange: Exchange) -> None:
        if exchange.path == "/health":
            await self._health(exchange)
            return
        is_plain = not {".", ".."} & set(exchange.path.split("/"))  # they would lead out of /v1
        if not PASSED.match(exchange.path) or not is_plain:
            raise GatewayError(404, f"path: found {exchange.path!r}, allowed: /health and paths under /v1")
        self._admit(exchange)
        is_post = exchange.method == "POST"
        if is_post and exchange.path == CHAT_PATH:
            body = await exchange.json_body()
            await exchange.while_connected(self._service.chat(exchange, body))
        elif is_post and exchange.path in (RESPONSES_PATH, MESSAGES_PATH):
            translated = translate(await exchange.json_body(), exchange.path, await self._service.facts())
            headers = [*exchange.passed_headers(b"content-type"), (b"content-type", b"application/json")]
            await exchange.while_connected(self._pass(exchange, json.dumps(translated).encode(), headers))
        else:
            content = await exchange.body()
            await exchange.while_connected(self._pass(exchange, content, exchange.passed_headers()))

    async def _pass(self, exchange: Exchange, content: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """The upstream's own answer, as it comes."""
        async with self._upstream.open(exchange.method, exchange.target, headers, content, exchange.query) as response:
            await exchange.start(response.status_code, kept_headers(response.headers.raw))
            async for part in response.aiter_raw():
                await exchange.write(part)
        await exchange.end()

    def _admit(self, exchange: Exchange) -> None:
        """Raises GatewayError 401 for a client without the key."""
        if self._key is None:
            return
        given = (exchange.header(b"authorization") or b"").removeprefix(b"Bearer ").strip()
        given = given or exchange.header(b"x-api-key") or b""
        if not hmac.compare_digest(given, self._key.encode()):
            raise GatewayError(401, "authorization: found no or another key, allowed: the one of --api-key")

    async def _health(self, exchange: Exchange) -> None:
        facts = None
        with contextlib.suppress(GatewayError):
            facts = await self._service.facts()
        status = 0
        if facts is not None:
            with contextlib.suppress(GatewayError):
                status = await self._upstream.status(facts.kind.health)
        # An upstream that wants a key, or has no such route, is there all the same.
        is_well = 0 < status < 500
        state: dict[str, Any] = {"status": "ok" if is_well else "upstream not ready", "upstream": self._upstream.url}
        state["upstream_kind"] = facts.kind.name if facts else None
        await exchange.answer(200 if is_well else 503, json.dumps(state).encode())
