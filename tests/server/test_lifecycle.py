"""Draining, deadlines, dead engines, exit codes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from running import running_server

from aphrodite.config import ServerSettings
from aphrodite.errors import ConfigError
from aphrodite.server.config import ServerConfig
from aphrodite.server.model_pool import ModelPool
from aphrodite.server.run import bind_socket, serve

ROOT = Path(__file__).parents[2]


class ServedBySignals:
    """A server in this process that takes this process's signals."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.engine = engine
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = ServerConfig(port=0, **settings)
        sock = bind_socket("127.0.0.1", 0)
        self.exit_code = asyncio.ensure_future(
            serve(ModelPool.of_engine(engine, config), config, sock, on_ready=ready.set_result)
        )
        self._ready = ready

    async def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=await self._ready, timeout=20)


def stream(http: httpx.AsyncClient) -> asyncio.Future[httpx.Response]:
    body = {"prompt": "a", "stream": True, "max_tokens": 10}
    return asyncio.ensure_future(http.post("/v1/completions", json=body))


async def refused(http: httpx.AsyncClient) -> httpx.Response:
    """A new request's answer, once the signal has been taken."""
    while True:
        response = await http.get("/health")
        if response.status_code != 200:
            return await http.post("/v1/completions", json={"prompt": "a"})


async def test_sigterm_lets_running_requests_finish_and_refuses_new_ones() -> None:
    server = ServedBySignals(FakeEngine(hold_after=3), shutdown_timeout=20.0)
    async with await server.client() as http:
        running = stream(http)
        whole = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 10}))
        await server.engine.until_running(2)
        os.kill(os.getpid(), signal.SIGTERM)
        response = await refused(http)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert int(response.headers["retry-after"]) > 0
        assert (await http.get("/v1/models")).status_code == 200
        server.engine.gate.set()
        assert (await running).text.endswith("data: [DONE]\n\n")
        assert "error" not in (await running).text
        assert (await whole).json()["choices"][0]["finish_reason"] == "length"
    assert await server.exit_code == 0


async def test_the_deadline_cuts_off_with_a_last_event() -> None:
    server = ServedBySignals(FakeEngine(hold_after=3), shutdown_timeout=0.1)
    async with await server.client() as http:
        running = stream(http)
        whole = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "a"}))
        await server.engine.until_running(2)
        await server.engine.holding.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        text = (await running).text
        assert '"code":"shutting_down"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert (await whole).status_code == 503
    assert await server.exit_code == 1
    assert not server.engine.running


async def test_the_second_signal_ends_at_once() -> None:
    server = ServedBySignals(FakeEngine(hold_after=3), shutdown_timeout=600.0)
    async with await server.client() as http:
        running = stream(http)
        await server.engine.holding.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await refused(http)
        os.kill(os.getpid(), signal.SIGINT)
        assert await server.exit_code == 128 + signal.SIGINT
        await asyncio.wait((running,))


async def test_an_idle_server_stops_at_once_with_code_0() -> None:
    server = ServedBySignals(FakeEngine(), shutdown_timeout=600.0)
    async with await server.client() as http:
        assert (await http.get("/health")).status_code == 200
        os.kill(os.getpid(), signal.SIGINT)
        assert await server.exit_code == 0


async def test_engine_death_ends_the_server_with_code_1() -> None:
    server = ServedBySignals(FakeEngine(hold_after=3))
    async with await server.client() as http:
        running = stream(http)
        await server.engine.holding.wait()
        server.engine.dead.set()
        assert '"code":"engine_dead"' in (await running).text
    assert await server.exit_code == 1


async def test_engine_death_during_a_drain_is_not_a_clean_end() -> None:
    server = ServedBySignals(FakeEngine(hold_after=3), shutdown_timeout=600.0)
    async with await server.client() as http:
        running = stream(http)
        await server.engine.holding.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await refused(http)
        server.engine.dead.set()
        await running
    assert await server.exit_code == 1


async def test_a_dead_engine_is_503_everywhere_but_on_static_pages(make_app: Any) -> None:
    app, engine = make_app()
    engine.dead.set()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
        for route in app.routes:
            (method,) = route.methods - {"HEAD"}
            response = await http.request(
                method, route.path.replace("{model_id:path}", "x"), headers={"content-type": "application/json"}
            )
            assert response.status_code == (200 if route.path in ("/", "/docs") else 503)


async def test_a_hung_engine_is_not_healthy() -> None:
    async with running_server(FakeEngine(hung=True), health_timeout=0.05) as server:
        answers = await asyncio.gather(*(server.http.get("/health") for _ in range(5)))
        assert {answer.status_code for answer in answers} == {503}
        assert answers[0].json()["error"]["code"] == "engine_unhealthy"
        server.engine.hung = False
        assert (await server.http.get("/health")).status_code == 200


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"port \d+.*--port"):
            bind_socket("127.0.0.1", taken.getsockname()[1])


def test_a_process_that_serves_ends_with_the_exit_code_of_serve() -> None:
    """With uvloop, in a process of its own, as the command line runs it."""
    program = (
        "import sys, uvloop; sys.path.insert(0, 'tests/server');"
        "from fake_engine import FakeEngine; from aphrodite.server.run import serve;"
        "from aphrodite.server.config import ServerConfig; from aphrodite.server.model_pool import ModelPool\n"
        "async def main():\n"
        "    config = ServerConfig(port=0)\n"
        "    pool = ModelPool.of_engine(FakeEngine(), config)\n"
        "    return await serve(pool, config, on_ready=lambda url: print(url, flush=True))\n"
        "sys.exit(uvloop.run(main()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert httpx.get(f"{url}/health").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    process.stdout.close()


def test_every_time_out_of_the_settings_reaches_the_server() -> None:
    names = ("shutdown_timeout", "request_timeout", "ping_interval", "write_timeout", "health_timeout")
    values = {name: 100.0 + number for number, name in enumerate(names)}
    config = ServerConfig.from_settings(ServerSettings(**values))
    assert {name: getattr(config, name) for name in names} == values
    assert ServerConfig.from_settings(ServerSettings()) == ServerConfig()
