"""Clients that connect and then do nothing, or too many of them, or claim an origin that cannot be read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from starlette.datastructures import Headers
from uvicorn.server import ServerState

from megavl.serve import connections
from megavl.serve.connections import BoundedConnection
from megavl.serve.guard import Guard
from megavl.serve.refusal import Refusal
from tests.tiny_run import PATIENCE_S

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HUGE = b"x" * (64 << 20)

Port = int
ended: list[str] = []


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
    """`/` answers with a word, `/huge` with more than sockets hold, `/slow` never."""
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    body = HUGE if scope["path"] == "/huge" else b"red"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    ended.append(scope["path"])


def serve(client: Callable[[Port], Awaitable[None]], *, most: int = 10) -> None:
    """Run a client beside a server with this many connections; in the end none is left."""

    async def inside() -> None:
        config = uvicorn.Config(app, http=BoundedConnection.upto(most), ws="none", lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        protocol: Any = config.http_protocol_class
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
        await asyncio.wait_for(client(server.sockets[0].getsockname()[1]), PATIENCE_S)
        while state.connections:
            await asyncio.sleep(0.01)
        server.close()

    asyncio.run(asyncio.wait_for(inside(), PATIENCE_S))


async def everything(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: ", REQUEST + b"GET /"])
def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)

    async def client(port: Port) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        found = await everything(reader)
        assert found.startswith(b"HTTP/1.1 200") == (sent[:17] == REQUEST[:17] and len(sent) > len(REQUEST))

    serve(client)


def test_an_answer_may_take_longer_than_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)

    async def client(port: Port) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST.replace(b"/", b"/slow", 1))
        assert b"red" in await everything(reader)

    serve(client)


def test_a_client_that_reads_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.1)
    ended.clear()

    async def client(port: Port) -> None:
        loop, silent = asyncio.get_running_loop(), socket.socket()
        silent.setblocking(False)
        await loop.sock_connect(silent, ("127.0.0.1", port))
        await loop.sock_sendall(silent, REQUEST.replace(b"/", b"/huge", 1))
        while not ended:
            await asyncio.sleep(0.01)
        silent.close()

    serve(client)


def test_connections_beyond_the_limit_are_turned_away() -> None:
    async def client(port: Port) -> None:
        first = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in first:
            writer.write(REQUEST)
        for reader, _ in first:
            await reader.readuntil(b"red")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await everything(reader)).startswith(b"HTTP/1.1 503 ")
        for _, opened in [*first, (reader, writer)]:
            opened.close()

    serve(client, most=2)


@pytest.mark.parametrize("origin", ["http://[x", "http://]", "http://[::1", "null", "", "http://localhost.evil"])
def test_an_unreadable_origin_is_foreign(origin: str) -> None:
    with pytest.raises(Refusal, match="is another site") as refused:
        Guard(["localhost"]).check(Headers({"host": "localhost", "origin": origin}), method="GET")
    assert refused.value.status == 403
