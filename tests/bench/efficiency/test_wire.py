"""The HTTP transport against servers that send every legal thing, and some illegal ones, over a real socket."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_puzzle.bench.efficiency.wire import Chunked, WireTransport

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def exchange(answers: list[list[bytes]], requests: int = 1, hangs_up: bool = False) -> tuple[list[Any], int]:
    """Ask `requests` times; each list of parts is one answer, a pause between its parts. Returns bodies or errors, and
    how many connections it took.
    """
    connections, waiting = 0, iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                for part in next(waiting):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.002)
                if hangs_up:
                    break
        except (asyncio.IncompleteReadError, StopIteration, ConnectionError):
            pass
        writer.close()

    async def main() -> list[Any]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        transport = WireTransport(asyncio.get_running_loop().time)
        found: list[Any] = []
        for _ in range(requests):
            try:
                async with asyncio.timeout(5):
                    response = await transport.handle_async_request(httpx.Request("GET", url))
                    stream = response.stream
                    assert isinstance(stream, httpx.AsyncByteStream)
                    try:
                        found.append(b"".join([part async for part in stream]))
                    finally:
                        await stream.aclose()
            except httpx.HTTPError as error:
                found.append(error)
            await asyncio.sleep(0.005)  # the end of a connection has its own packet
        await transport.aclose()
        server.close()
        return found

    return asyncio.run(main()), connections


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"data: 1\n\n", b"data: 2\n\n")],
        [HEAD + b"transfer-encoding: Chunked\r\n\r\n", *[bytes([one]) for one in chunked(b"data: 1\n\ndata: 2\n\n")]],
        [
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n9;a=b\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\nX-Late: 1\r\n",
            b"\r\n",
        ],
        [HEAD[:9], HEAD[9:] + b"Content-Length: 18\r\n\r\ndata: 1\n", b"\ndata: 2\n\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 18\r\n\r\ndata: 1\n\ndata: 2\n\n"],
    ],
    ids=["chunks", "byte by byte", "extension and trailer", "length", "continue first"],
)
def test_a_body_is_read_whole_and_the_connection_used_again(parts: list[bytes]) -> None:
    bodies, connections = exchange([parts, parts, parts], requests=3)
    assert bodies == [b"data: 1\n\ndata: 2\n\n"] * 3
    assert connections == 1


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    bodies, connections = exchange([[HEAD + b"\r\n", b"data: 1\n\n"]] * 2, requests=2, hangs_up=True)
    assert (bodies, connections) == ([b"data: 1\n\n"] * 2, 2)


def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    answer = [HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok"]
    assert exchange([answer] * 2, requests=2, hangs_up=True) == ([b"ok"] * 2, 2)
    # The same without a word: seen when the connection ends, or when nothing comes back from it.
    silent = [HEAD + b"Content-Length: 2\r\n\r\nok"]
    assert exchange([silent] * 2, requests=2, hangs_up=True) == ([b"ok"] * 2, 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1"], "in the middle of the reply"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], "a chunk of length b'zz'"),
        ([HEAD + b"Content-Length: 100\r\n\r\ndata"], "in the middle of the reply"),
        ([HEAD], "in the head of the reply"),
        ([], "closed the connection without a reply"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "not HTTP/1.1"),
        ([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000], "a head of more than 65536 bytes"),
    ],
)
def test_what_breaks_off_or_is_no_http_is_an_error_of_httpx(parts: list[bytes], message: str) -> None:
    (found,), _ = exchange([parts], hangs_up=True)
    assert isinstance(found, httpx.RemoteProtocolError) and message in str(found)


def test_nobody_listening_is_a_connect_error() -> None:
    async def main() -> None:
        transport = WireTransport(asyncio.get_running_loop().time)
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(httpx.Request("GET", "http://127.0.0.1:9/x"))

    asyncio.run(main())


def test_parts_are_stamped_when_they_arrive_even_if_nobody_reads_them() -> None:
    async def main() -> list[float]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD + b"Content-Length: 3\r\n\r\n")
            for letter in (b"a", b"b", b"c"):
                await asyncio.sleep(0.02)
                writer.write(letter)
                await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"
        loop = asyncio.get_running_loop()
        transport = WireTransport(loop.time)
        response = await transport.handle_async_request(httpx.Request("GET", url))
        begun = loop.time()
        await asyncio.sleep(0.2)
        stamps = [response.stream.stamp - begun async for _ in response.stream]  # type: ignore[union-attr]
        await transport.aclose()
        server.close()
        return stamps

    # They came 20, 40 and 60 ms after the head; whoever stamps while reading has 200 for all.
    stamps = asyncio.run(main())
    assert len(stamps) == 3 and stamps == sorted(stamps) and max(stamps) < 0.19


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 400), max_size=10))
def test_a_chunked_body_is_the_same_however_it_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    data = chunked(*parts)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder = Chunked()
    found = b"".join(decoder.feed(data[low:high]) for low, high in itertools.pairwise(edges))
    assert found == b"".join(parts) and decoder.is_done
