"""The outermost layer: a request id for everything, and one place where an exception becomes an answer."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aphrodite.server.errors import ApiError, ClientDisconnectedError, ErrorShape, to_api_error
from aphrodite.server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

UNMATCHED = "unmatched"


class Edge:
    """ASGI wrapper that counts, names and answers for every request; no exception leaves it."""

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, shapes: Mapping[str, ErrorShape], *, log_requests: bool
    ) -> None:
        """`shapes` says by path how errors are written there; elsewhere they have OpenAI's shape."""
        self._app = app
        self._metrics = metrics
        self._shapes = shapes
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began = time.monotonic()
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnectedError:
            status = status or 499
        except Exception as error:
            if not status:
                await send_error(send_named, to_api_error(error, request_id), self._shapes.get(scope["path"]))
            elif not isinstance(error, ApiError):
                logger.error("request %s failed after its answer began", request_id, exc_info=error)
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.count_http(route, scope["method"], status)
        if self._log_requests:
            seconds = time.monotonic() - began
            logger.info("%s %s %s %d %.3f s", request_id, scope["method"], scope["path"], status, seconds)


async def send_error(send: Send, error: ApiError, shape: ErrorShape | None = None) -> None:
    body = error.encode(shape)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error.headers,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _answer_lifespan(receive: Receive, send: Send) -> None:
    """The engine is started and stopped by whoever made it, so there is nothing to do here."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
