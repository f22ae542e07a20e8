"""Who is being served, and when the server stops taking more: draining, and the death of the engine."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from aphrodite.server.auth import STATIC_PATHS
from aphrodite.server.errors import ApiError, engine_dead, shutting_down


class ActiveRequest:
    """A generation that is under way; `stop` ends it from outside with the error its client will see."""

    __slots__ = ("_task", "reason")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self.reason: ApiError | None = None

    def stop(self, reason: ApiError) -> None:
        if self.reason is None and self._task.cancel():
            self.reason = reason


class Lifecycle:
    """The server's set of running generations.

    Attributes:
        draining: no new work is taken; what runs goes on.
        idle: set while no generation runs.
    """

    def __init__(self) -> None:
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._active: set[ActiveRequest] = set()

    def __len__(self) -> int:
        return len(self._active)

    def begin(self, task: asyncio.Task[Any]) -> ActiveRequest:
        active = ActiveRequest(task)
        self._active.add(active)
        self.idle.clear()
        return active

    def end(self, active: ActiveRequest) -> None:
        self._active.discard(active)
        if not self._active:
            self.idle.set()

    def stop_all(self, reason: ApiError) -> int:
        """End every running generation; returns how many there were."""
        for active in list(self._active):
            active.stop(reason)
        return len(self._active)


class Gate:
    """ASGI wrapper that answers 503 when the server is `dead`, or to new work while the server drains."""

    def __init__(self, app: ASGIApp, dead: asyncio.Event, lifecycle: Lifecycle) -> None:
        self._app = app
        self._dead = dead
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in STATIC_PATHS:
            if self._dead.is_set():
                raise engine_dead()
            if self._lifecycle.draining and (scope["method"] == "POST" or scope["path"] == "/health"):
                raise shutting_down()
        await self._app(scope, receive, send)
