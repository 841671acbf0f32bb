"""HTTP/1.1 for streams, as a transport for httpx: each received part is stamped when the loop takes it off the socket.

httpx's own transport hands a part through four layers before anyone can stamp it, and a benchmark that follows 64
streams then stamps the last of a burst milliseconds late. Here a burst is stamped before its first part is decoded.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

MAX_HEAD = 64 * 1024
Origin = tuple[str, str, int]


class Connection(asyncio.Protocol):
    """One connection. Parts wait in `parts` with their stamps until somebody reads them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.parts: deque[tuple[float, bytes]] = deque()
        self.transport: asyncio.Transport | None = None
        self.is_closed = False
        self.requests = 0
        self._waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by the loop: stamp, and nothing else."""
        self.parts.append((self.clock(), data))
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def part(self) -> tuple[float, bytes]:
        """The next part; an empty one at the end of the connection."""
        while not self.parts:
            if self.is_closed:
                return self.clock(), b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.parts.popleft()

    def write(self, data: bytes) -> None:
        """Send a request."""
        assert self.transport is not None
        self.requests += 1
        self.transport.write(data)

    def close(self) -> None:
        """At once: a server must see that nobody listens any more."""
        self.is_closed = True
        if self.transport is not None:
            self.transport.abort()


@dataclass(slots=True)
class Head:
    """Status and headers of a reply. rest: what came after them."""

    status: int
    headers: list[tuple[bytes, bytes]]
    rest: bytes
    stamp: float

    def get(self, name: bytes) -> bytes:
        """A header's value in lower case, or nothing."""
        return next((value.lower() for key, value in self.headers if key.lower() == name), b"")


class Body(httpx.AsyncByteStream):
    """A reply's body as it comes. `stamp` is when what was yielded last arrived."""

    def __init__(self, connection: Connection, head: Head, release: Callable[[Connection, bool], None]) -> None:
        self.stamp = head.stamp
        self._connection, self._head, self._release = connection, head, release
        self._is_whole = False
        self._keeps_open = head.get(b"connection") != b"close"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields parts. Raises httpx.RemoteProtocolError when the connection ends before the body does."""
        head = self._head
        if b"chunked" in head.get(b"transfer-encoding"):
            decoder = Chunked()
            async for data in self._received():
                decoded = decoder.feed(data)
                if decoded:
                    yield decoded
                if decoder.is_done:
                    break
            self._is_whole = decoder.is_done
        elif head.get(b"content-length"):
            left = int(head.get(b"content-length"))
            if left:
                async for data in self._received():
                    left -= len(data)
                    yield data
                    if left <= 0:
                        break
            self._is_whole = left <= 0
        else:
            async for data in self._received():
                yield data
            self._is_whole, self._keeps_open = True, False
        if not self._is_whole:
            raise httpx.RemoteProtocolError("the connection ended in the middle of the reply")

    async def _received(self) -> AsyncIterator[bytes]:
        if self._head.rest:
            yield self._head.rest
        while True:
            self.stamp, data = await self._connection.part()
            if not data:
                return
            yield data

    async def aclose(self) -> None:
        """Give the connection back, or close it when the reply was not read to its end."""
        self._release(self._connection, self._is_whole and self._keeps_open)


class Chunked:
    """Decoder of the chunked transfer coding; trailers are dropped."""

    def __init__(self) -> None:
        self.is_done = False
        self._is_in_trailer = False
        self._left = 0  # of the chunk at hand, its line end included
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """What of the body is in `data`. Raises httpx.RemoteProtocolError."""
        data, self._rest = self._rest + data if self._rest else data, b""
        out = b""
        while data and not self.is_done:
            if self._left:
                part, data = data[: self._left], data[self._left :]
                # The chunk's last two bytes are its line end, which may come apart from the rest.
                keep = max(0, min(len(part), self._left - 2))
                out += part[:keep]
                self._left -= len(part)
                continue
            line, found, after = data.partition(b"\r\n")
            if not found:
                if len(data) > MAX_HEAD:
                    raise httpx.RemoteProtocolError("a chunk without a length")
                self._rest = data
                break
            data = after
            if self._is_in_trailer:
                self.is_done = not line
                continue
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise httpx.RemoteProtocolError(f"a chunk of length {line[:20]!r}") from None
            self._is_in_trailer = size == 0
            self._left = size + 2 if size else 0
        return out


@dataclass(slots=True)
class WireTransport(httpx.AsyncBaseTransport):
    """Keeps connections open and uses them again. clock: of the stamps. verify: whether certificates are checked."""

    clock: Callable[[], float]
    verify: bool = True
    idle: dict[Origin, list[Connection]] = field(default_factory=dict)
    _context: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; returns when the head has come. Raises httpx.TransportError."""
        body = b"".join([part async for part in request.stream])  # type: ignore[union-attr]
        raw = _request_bytes(request, body)
        while True:
            connection = await self._connection(request.url)
            is_fresh = connection.requests == 0
            try:
                connection.write(raw)
                head = await _read_head(connection)
            except BaseException:
                connection.close()
                raise
            if head is not None:
                break
            connection.close()
            if is_fresh:
                raise httpx.RemoteProtocolError("the server closed the connection without a reply")
            # It had closed an idle connection just then: nothing was taken, so a new one is no second try.
        release = self._releaser(request.url)
        return httpx.Response(head.status, headers=head.headers, stream=Body(connection, head, release))

    async def _connection(self, url: httpx.URL) -> Connection:
        idle = self.idle.get(_origin(url), [])
        while idle:
            connection = idle.pop()
            if not connection.is_closed and not connection.parts:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        scheme, host, port = _origin(url)
        context = self._tls() if scheme == "https" else None
        try:
            _, connection = await loop.create_connection(lambda: Connection(self.clock), host, port, ssl=context)
        except OSError as error:
            raise httpx.ConnectError(str(error) or type(error).__name__) from error
        return connection

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = httpx.create_ssl_context(verify=self.verify)
        return self._context

    def _releaser(self, url: httpx.URL) -> Callable[[Connection, bool], None]:
        def release(connection: Connection, is_usable: bool) -> None:
            if is_usable and not connection.is_closed:
                self.idle.setdefault(_origin(url), []).append(connection)
            else:
                connection.close()

        return release

    async def aclose(self) -> None:
        """Close every idle connection."""
        for connections in self.idle.values():
            for connection in connections:
                connection.close()
        self.idle.clear()


def _origin(url: httpx.URL) -> Origin:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _request_bytes(request: httpx.Request, body: bytes) -> bytes:
    lines = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
    lines += [key + b": " + value for key, value in request.headers.raw]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def _read_head(connection: Connection) -> Head | None:
    """None when the connection ended before anything came. Raises httpx.RemoteProtocolError."""
    data, stamp = b"", 0.0
    while True:
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            first, *lines = data[:end].split(b"\r\n")
            version, _, status = first.partition(b" ")
            if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
                raise httpx.RemoteProtocolError(f"a reply that is not HTTP/1.1: {first[:40]!r}")
            data = data[end + 4 :]
            if status.startswith(b"1"):  # 100 Continue and its like
                continue
            pairs = [line.partition(b":")[::2] for line in lines]
            return Head(int(status[:3]), [(key, value.strip()) for key, value in pairs], data, stamp)
        if len(data) > MAX_HEAD:
            raise httpx.RemoteProtocolError(f"a head of more than {MAX_HEAD} bytes")
        stamp, part = await connection.part()
        if not part:
            if data:
                raise httpx.RemoteProtocolError("the connection ended in the head of the reply")
            return None
        data += part
