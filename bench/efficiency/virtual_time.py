"""A run against the mock without waiting: an event loop whose clock jumps, and a transport that needs no socket.

Delays that are multiples of a power of two add without rounding, so that a run's numbers equal their closed forms to
the last bit.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import httpx
from vllm_puzzle.bench.efficiency.mock import Mock

T = TypeVar("T")
_GRID = 2**32
_END = (0.0, b"", True)


class _Jump(selectors.SelectSelector):
    """Waits for nothing: time moves on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now."""
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("virtual time: everybody waits and nobody will ever go on")
            # On a grid finer than the loop's clock, so that now + (when - now) is `when` again.
            self.now = round((self.now + max(0.0, timeout)) * _GRID) / _GRID
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on a clock that starts at 0 and jumps to the next timer."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jump.now


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a VirtualLoop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class MockTransport(httpx.AsyncBaseTransport):
    """Speaks to a Mock in the same loop. A part arrives when the mock sends it, `latency` seconds later."""

    def __init__(self, app: Mock, latency: float = 0.0) -> None:
        self.app = app
        self.latency = latency

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.ConnectError when the mock is dead."""
        if self.app.is_dead:
            raise httpx.ConnectError("connection refused")
        body = b"".join([part async for part in request.stream])  # type: ignore[union-attr]
        stream = _Stream(self.app, request, body, self.latency)
        return httpx.Response(await stream.status(), stream=stream)


class _Stream(httpx.AsyncByteStream):
    def __init__(self, app: Mock, request: httpx.Request, body: bytes, latency: float) -> None:
        self.stamp = 0.0
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[float, bytes, bool]] = asyncio.Queue()
        self._status: asyncio.Future[int] = self._loop.create_future()
        self._body = body
        scope = {"type": "http", "path": request.url.path, "method": request.method}
        self._task = asyncio.create_task(self._serve(app, scope))

    async def _serve(self, app: Mock, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
            self._parts.put_nowait(_END)
        except Exception as error:  # as a server does: the connection breaks, whatever it was
            if not self._status.done():
                self._status.set_exception(httpx.RemoteProtocolError(f"closed without a reply ({error!r})"))
            self._parts.put_nowait((self._loop.time(), b"", False))

    async def _receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._status.set_result(message["status"])
        elif message.get("body"):
            self._parts.put_nowait((self._loop.time() + self._latency, message["body"], False))

    async def status(self) -> int:
        return await self._status

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            due, data, is_end = await self._parts.get()
            if is_end:
                return
            if due > self._loop.time():
                await asyncio.sleep(due - self._loop.time())
            if not data:
                raise httpx.RemoteProtocolError("the connection ended in the middle of the reply")
            self.stamp = due
            yield data

    async def aclose(self) -> None:
        self._task.cancel()
