"""`/health` and `/version`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

import aphrodite
from aphrodite.errors import EngineDeadError
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import ApiError, retry_after
from aphrodite.server.responses import json_response


class HealthEndpoint:
    """Asks the engines' own loops, so that an engine that hangs is not healthy. Callers share one round trip."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._check: asyncio.Task[None] | None = None

    async def health(self, request: Request) -> Response:
        """200 if a message went through the loop of each engine that runs and came back."""
        if self._check is None or self._check.done():
            self._check = asyncio.ensure_future(self._ask())
        try:
            # The round trip goes on for others when this caller leaves.
            await asyncio.shield(self._check)
        except (EngineDeadError, TimeoutError):
            raise ApiError(
                503, "The engine does not answer.", code="engine_unhealthy", headers=retry_after(10)
            ) from None
        return json_response({"status": "ok"})

    async def _ask(self) -> None:
        running = [model.loaded.engine for model in self._context.models.models if model.loaded is not None]
        checks = asyncio.gather(*(engine.check_health() for engine in running))
        await asyncio.wait_for(checks, self._context.config.health_timeout)


async def version(request: Request) -> Response:
    """The server's version."""
    return json_response({"version": aphrodite.__version__})
