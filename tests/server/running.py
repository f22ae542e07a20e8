"""A real server on a loopback port, in the test's own event loop, before an engine without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property

import httpx
import openai
from fake_engine import FakeEngine

from aphrodite.server.config import ServerConfig
from aphrodite.server.model_pool import ModelPool
from aphrodite.server.run import bind_socket, serve


@dataclass
class RunningServer:
    engine: FakeEngine
    url: str
    key: str
    http: httpx.AsyncClient

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        """OpenAI's own client; made when first used, because that takes long."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)


@asynccontextmanager
async def running_server(
    engine: FakeEngine | None = None, make_pool: Callable[[ServerConfig], ModelPool] | None = None, **settings: object
) -> AsyncIterator[RunningServer]:
    """Serve on a free port until the block ends: `engine`, or the models of a pool."""
    engine = engine or FakeEngine()
    config = ServerConfig(host="127.0.0.1", port=0, shutdown_timeout=0.0, **settings)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    pool = make_pool(config) if make_pool else ModelPool.of_engine(engine, config)
    task = asyncio.ensure_future(serve(pool, config, bind_socket("127.0.0.1", 0), on_ready=ready.set_result))
    await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
    try:
        async with httpx.AsyncClient(base_url=ready.result(), timeout=20, verify=False) as http:
            server = RunningServer(engine, ready.result(), (*config.api_keys, "none")[0], http)
            yield server
            if "client" in vars(server):
                await server.client.close()
    finally:
        pool.dead.set()  # which with one model is that of its engine
        await task
        await pool.close()
