"""The connection to the server behind: requests, streamed replies, and one line when it cannot be reached."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from vllm_puzzle.serving.gateway.errors import GatewayError, UpstreamRefusal

CONNECT_S = 10.0
WRITE_S = 60.0
PROBE_S = 10.0


class Upstream:
    """An OpenAI-compatible server. `url` may end in /v1. Proxy settings of the environment do not apply: the URL is
    reached directly.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = api_key
        # No limit on reading: a reply takes as long as its client waits, and its connection is closed when he leaves.
        timeout = httpx.Timeout(connect=CONNECT_S, read=None, write=WRITE_S, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    @asynccontextmanager
    async def open(
        self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], content: bytes = b"", query: bytes = b""
    ) -> AsyncIterator[httpx.Response]:
        """A reply whose body is still to be read. Leaving the block closes it, which tells the server to stop.

        Raises GatewayError 502 when the server cannot be reached or breaks off.
        """
        url = httpx.URL(self.url + path).copy_with(query=query or None)
        try:
            request = self._client.build_request(method, url, headers=list(headers), content=content or None)
            response = await self._client.send(request, stream=True)
            try:
                yield response
            finally:
                await response.aclose()
        except (httpx.RequestError, httpx.StreamError) as error:
            what = " ".join(f"{type(error).__name__} {error}".split())
            raise GatewayError(
                502, f"upstream {self.url}: found no whole answer ({what}), allowed: a server"
            ) from error

    @asynccontextmanager
    async def post(
        self, path: str, headers: Iterable[tuple[bytes, bytes]], body: dict[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        """The same for a JSON body. Raises UpstreamRefusal with the server's own answer when it is an error."""
        content = json.dumps(body).encode()
        async with self.open("POST", path, json_headers(headers), content) as response:
            if response.status_code >= 400:
                content_type = response.headers.get("content-type", "application/json")
                raise UpstreamRefusal(response.status_code, content_type, await response.aread())
            yield response

    async def get_json(self, path: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Any:
        """The JSON of a short GET, or None if there is none at that path. Raises GatewayError 502 as `open`."""
        key = [(b"authorization", f"Bearer {self._key}".encode())] if self._key and not headers else []
        try:
            response = await self._client.get(self.url + path, headers=[*headers, *key], timeout=PROBE_S)
        except httpx.RequestError as error:
            what = " ".join(f"{type(error).__name__} {error}".split())
            raise GatewayError(502, f"upstream {self.url}: found no answer ({what}), allowed: a server") from error
        try:
            return response.json() if response.status_code == 200 else None
        except ValueError:
            return None

    async def status(self, path: str) -> int:
        """The status of a short GET. Raises GatewayError 502 as `open`."""
        try:
            return (await self._client.get(self.url + path, timeout=PROBE_S)).status_code
        except httpx.RequestError as error:
            raise GatewayError(502, f"upstream {self.url}: found no answer ({type(error).__name__})") from error


def json_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of a body that we have written, for a reply that we shall read."""
    own = {b"content-type": b"application/json", b"accept-encoding": b"identity"}
    return [*((name, value) for name, value in headers if name not in own), *own.items()]
