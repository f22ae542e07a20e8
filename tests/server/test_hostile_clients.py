"""Clients that mean harm, or know no better, over raw sockets: the server outlives each and serves the next."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fake_engine import FakeEngine, FakeModel
from running import RunningServer, running_server

from aphrodite.server.connections import allow_connections, watch_peer

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connection(server: RunningServer, *, limit: int = 2**16) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def post(path: str, body: bytes, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if not headers:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def completion(prompt: str, **fields: object) -> bytes:
    return post("/v1/completions", json.dumps({"prompt": prompt, "max_tokens": 4, **fields}).encode())


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next response on a connection."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode().lower()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
    return int(head.split()[1]), await asyncio.wait_for(reader.readexactly(length), 20)


async def check_alive(server: RunningServer) -> None:
    response = await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
    assert response.json()["choices"][0]["text"] == "Once"


async def test_pipelined_requests_are_answered_in_their_order(server: RunningServer) -> None:
    async with connection(server) as (reader, writer):
        writer.write(b"".join(completion(f"{number:03}") for number in range(60)))
        for _ in range(60):
            status, body = await answer(reader)
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "Once")
    assert [bytes(seen[0][1:]).decode() for seen in server.engine.seen] == [f"{number:03}" for number in range(60)]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_client_that_pipelined_and_left_nothing_goes_on(stream: bool) -> None:
    async with running_server(FakeEngine(hold_after=2)) as server:
        async with connection(server) as (_, writer):
            writer.write(completion("a", stream=stream) * 10)
            await server.engine.holding.wait()
        await asyncio.wait_for(server.engine.idle.wait(), 20)
        assert len(server.engine.seen) == 1
        server.engine.hold_after = None
        await check_alive(server)


async def test_a_thousand_idle_connections_leave_room_for_work() -> None:
    async with running_server() as server:
        idle = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", server.port) for _ in range(1000)))
        await check_alive(server)
        # Each of them is still good for a request.
        for reader, writer in idle[::100]:
            writer.write(completion("a"))
            assert (await answer(reader))[0] == 200
        for _, writer in idle:
            writer.transport.abort()
        await check_alive(server)


async def test_a_client_that_will_send_no_more_still_counts_as_gone_or_gets_its_answer() -> None:
    """Half closed: the end of its side came behind a whole request."""
    async with running_server(FakeEngine(hold_after=2)) as server:
        async with connection(server) as (reader, writer):
            writer.write(completion("a", stream=True))
            writer.write_eof()
            rest = asyncio.ensure_future(reader.read())
            await asyncio.wait(
                (rest, asyncio.ensure_future(server.engine.holding.wait())), return_when="FIRST_COMPLETED"
            )
            server.engine.gate.set()
            await asyncio.wait_for(rest, 20)
        await asyncio.wait_for(server.engine.idle.wait(), 20)
        await check_alive(server)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reader_that_stops_holds_no_more_than_the_sockets_buffers(stream: bool) -> None:
    """What a client has not read is not made: the answer waits for it, and is dropped after the write timeout."""
    engine = FakeEngine(FakeModel(max_model_len=1_000_000), hold_after=None)
    async with (
        running_server(engine, ping_interval=0.05, write_timeout=0.3) as server,
        connection(server) as (_, writer),
    ):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(completion("x" * 400_000, stream=stream, echo=True, n=32, max_tokens=40))
        await asyncio.wait_for(engine.started.wait(), 20)
        await asyncio.wait_for(engine.idle.wait(), 20)
        await check_alive(server)


MALFORMED = {
    "two lengths": post("/v1/completions", b'{"prompt":"a"}', "Content-Length: 14", "Content-Length: 3"),
    "length and chunks": post("/v1/completions", b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
    "negative length": post("/v1/completions", b"{}", "Content-Length: -2"),
    "length beyond 64 bits": post("/v1/completions", b"{}", f"Content-Length: {10**30}"),
    "odd length": post("/v1/completions", b"{}", "Content-Length: 0x2"),
    "chunk size": post("/v1/completions", b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "huge chunk": post("/v1/completions", b"ffffffffffffffffff\r\n{", "Transfer-Encoding: chunked"),
    "unknown coding": post("/v1/completions", b"{}", "Transfer-Encoding: gzip"),
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": bytes.fromhex("160301020001000 1fc0303".replace(" ", "")) + b"\x00" * 200,
    "no version": b"GET /health\r\n\r\n",
    "header without a name": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: 1\r\n 2\r\n\r\n",
    "nul in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: 1\x002\r\n\r\n",
    "path that is no utf-8": b"GET /\xff\xfe%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "absolute target": b"GET http://evil.com/v1/models HTTP/1.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n",
    "tunnel": b"CONNECT evil.com:443 HTTP/1.1\r\nHost: evil.com\r\nConnection: close\r\n\r\n",
    "websocket": b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "noise": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_malformed_starts_nothing_and_harms_nobody(name: str) -> None:
    async with running_server(header_timeout=0.5, body_timeout=0.5, keep_alive_timeout=0.5) as server:
        async with connection(server) as (reader, writer):
            writer.write(MALFORMED[name])
            got = await asyncio.wait_for(reader.read(), 20)
        if got:
            assert 400 <= int(got.split(b" ")[1]) < 500, got[:300]
        assert b"Traceback" not in got
        assert not server.engine.seen
        await check_alive(server)


async def test_of_a_key_that_comes_twice_the_last_holds(server: RunningServer) -> None:
    body = b'{"prompt": "a", "max_tokens": 9, "prompt": "b", "max_tokens": 4}'
    async with connection(server) as (reader, writer):
        writer.write(post("/v1/completions", body))
        status, text = await answer(reader)
    assert (status, json.loads(text)["choices"][0]["text"]) == (200, "Once")
    assert server.engine.seen[-1][0][1:] == [*b"b"]


def test_a_silent_peer_is_gone_after_a_while() -> None:
    with socket.socket() as sock:
        watch_peer(sock, 1e12)
        watch_peer(sock, 0.001)
    with socket.socket() as sock:
        watch_peer(sock, 60)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
            idle, interval, count = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count == 60


def test_files_for_connections_are_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for soft, hard, expected in ((1024, 100_000, (4608, 100_000)), (1024, 2048, (2048, 2048)), (8192, 8192, None)):
        asked.clear()
        caplog.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=(soft, hard): limits)
        allow_connections(4096)
        assert asked == ([] if expected is None else [expected])
        assert ("ulimit" in caplog.text) == (hard < 4608)
