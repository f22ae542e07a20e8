"""Work done for a client ends when the client leaves, when its time is up, or when the server must stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import NO_RETRY, ApiError, ClientDisconnectedError
from aphrodite.server.lifecycle import ActiveRequest, Lifecycle

T = TypeVar("T")
Tick = Callable[[], Awaitable[None]]


class Supervisor:
    """Runs generations beside a watcher of their clients: two tasks a request, nothing per token."""

    def __init__(self, lifecycle: Lifecycle, config: ServerConfig) -> None:
        self._lifecycle = lifecycle
        self._config = config

    async def run(self, work: Coroutine[Any, Any, T], receive: Receive, tick: Tick | None = None) -> T:
        """Run `work` to its end, or cancel it; `tick` is called every `ping_interval` meanwhile.

        Raises:
            ClientDisconnectedError: the client has gone.
            ApiError: `work` was stopped: its deadline has passed, or the server is going down.
            Exception: whatever `work` raised.
        """
        task = asyncio.ensure_future(work)
        active = self._lifecycle.begin(task)
        watcher = asyncio.ensure_future(self._watch(active, receive, tick))
        try:
            await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await _cancel(task)
                watcher.result()
                raise ClientDisconnectedError
            if task.cancelled() and active.reason is not None:
                raise active.reason
            return task.result()
        finally:
            await _cancel(watcher)
            await _cancel(task)
            self._lifecycle.end(active)

    async def _watch(self, active: ActiveRequest, receive: Receive, tick: Tick | None) -> None:
        """Return when the client has gone."""
        limit = self._config.request_timeout
        deadline = None if limit is None else time.monotonic() + limit
        interval = self._config.ping_interval
        while True:
            wait = interval if deadline is None else min(interval, deadline - time.monotonic())
            try:
                async with asyncio.timeout(wait):
                    while (await receive())["type"] != "http.disconnect":
                        pass
                return
            except TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    active.stop(_too_long(limit))
                    deadline = None
                elif tick is not None:
                    await tick()


def _too_long(limit: float | None) -> ApiError:
    return ApiError(
        504, f"The generation took longer than the {limit:g} s this server allows.", code="timeout", headers=NO_RETRY
    )


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel and wait, so that what the task holds (a place in the engine) is free afterwards."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
