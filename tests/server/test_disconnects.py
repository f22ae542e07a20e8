"""A client that leaves frees its request at any moment, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fake_engine import STORY, FakeEngine, FakeModel
from running import RunningServer, running_server


async def open_request(server: RunningServer, path: str, body: dict[str, Any]) -> asyncio.StreamWriter:
    """Send a whole request and read nothing."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_bytes(path, body))
    await writer.drain()
    return writer


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 4}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
]


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 3])
@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_leaving_frees_the_request(
    path: str, body: dict[str, Any], hold_after: int, stream: bool, abrupt: bool
) -> None:
    """While it waits for its first token, and in the middle; closed in order, and reset."""
    async with running_server(FakeEngine(hold_after=hold_after)) as server:
        engine = server.engine
        neighbour = asyncio.ensure_future(server.http.post("/v1/completions", json={"prompt": "n", "max_tokens": 90}))
        await engine.holding.wait()
        engine.holding.clear()
        writer = await open_request(server, path, {**body, "stream": stream, "max_tokens": 50})
        await engine.holding.wait()
        assert len(engine.running) >= 2
        if abrupt:
            writer.transport.abort()
        else:
            writer.close()
        await engine.until_running(1)
        engine.gate.set()
        answer = (await neighbour).json()
        assert answer["choices"][0]["text"] == STORY.encode()[:90].decode()
        await engine.idle.wait()


async def test_leaving_before_the_bodys_end_starts_nothing(server: RunningServer) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request_bytes("/v1/completions", {"prompt": "a" * 100})[:-20])
    await writer.drain()
    writer.close()
    assert (await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    assert len(server.engine.seen) == 1


async def test_leaving_after_the_end_changes_nothing(server: RunningServer) -> None:
    for _ in range(3):
        response = await server.http.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
    assert not server.engine.running


async def test_a_client_that_stops_reading_counts_as_gone() -> None:
    engine = FakeEngine(FakeModel(max_model_len=1_000_000))
    async with running_server(engine, ping_interval=0.05, write_timeout=0.2) as server:
        # Echoes of 10 MB: more than the sockets' buffers hold.
        body = {"prompt": "x" * 300_000, "echo": True, "stream": True, "n": 32, "max_tokens": 50}
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request_bytes("/v1/completions", body))
        await writer.drain()
        await asyncio.wait_for(engine.started.wait(), 20)
        await asyncio.wait_for(engine.idle.wait(), 20)
        assert not writer.is_closing()
        writer.transport.abort()


async def test_many_that_leave_at_random_leave_nothing_behind() -> None:
    async with running_server(FakeEngine(hold_after=4)) as server:
        engine = server.engine
        writers = [
            await open_request(server, "/v1/completions", {"prompt": "a", "stream": number % 2 == 0})
            for number in range(60)
        ]
        await engine.until_running(60)
        for writer in writers:
            writer.close()
        await asyncio.wait_for(engine.idle.wait(), 10)
        engine.gate.set()
        response = await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
        assert response.json()["choices"][0]["text"] == "Once "
