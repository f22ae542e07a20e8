"""uvicorn's HTTP protocol with the bounds it lacks: header size and count, time to send them, connections."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from aphrodite.server.config import ServerConfig
from aphrodite.server.connections import watch_peer
from aphrodite.server.errors import CLOSE, ApiError, Headers, retry_after

# A connection with more requests than these behind the one that is being answered is not read on.
_MAX_PIPELINED = 16


class HeaderLimitError(Exception):
    """Stops the parser; uvicorn then closes the connection with `send_400_response`."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. `limits` is set on the subclass that `bounded_protocol` makes.

    uvicorn tells only the request that arrived last of a client that has left, and reads no more once one waits behind
    another: the one that is being answered would go on for nobody.
    """

    limits: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._raw_bytes = 0  # received since the head began
        self._parsed_bytes = 0  # of complete lines
        self._refusal: ApiError | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            watch_peer(sock, self.limits.write_timeout)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                ApiError(503, "Too many connections.", code="too_many_connections", headers=retry_after(1) + CLOSE)
            )
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._raw_bytes += len(data)
        super().data_received(data)
        # A header without an end never reaches `on_header`.
        if self._in_head and self._raw_bytes > self.limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        self._in_head = True
        self._raw_bytes = 0
        self._parsed_bytes = 0
        self._start_head_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if len(self.headers) >= self.limits.max_headers:
            self._refusal = self._too_large()
            raise HeaderLimitError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_head_timer()
        super().on_headers_complete()
        if not self.pipeline:
            self._answered = self.cycle
        elif len(self.pipeline) <= _MAX_PIPELINED:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._answered = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, msg, code="invalid_http", headers=CLOSE))

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.limits.max_header_bytes:
            self._refusal = self._too_large()
            raise HeaderLimitError

    def _too_large(self) -> ApiError:
        return ApiError(
            431,
            f"The request's headers exceed {self.limits.max_header_bytes} bytes or {self.limits.max_headers} lines.",
            code="headers_too_large",
            headers=CLOSE,
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        body = error.encode()
        headers: Headers = (
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *error.headers,
        )
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        self.transport.close()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout, self._head_too_slow)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


def bounded_protocol(config: ServerConfig) -> type[BoundedHttpProtocol]:
    """The protocol class with this server's limits, as uvicorn takes it."""
    return type("ServerHttpProtocol", (BoundedHttpProtocol,), {"limits": config})
