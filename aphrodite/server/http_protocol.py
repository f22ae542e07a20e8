"""uvicorn's HTTP protocol with the bounds it lacks: header size and count, time to send them, connections."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from aphrodite.server.config import ServerConfig
from aphrodite.server.errors import CLOSE, ApiError, Headers, retry_after


class HeaderLimitError(Exception):
    """Stops the parser; uvicorn then closes the connection with `send_400_response`."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. `limits` is set on the subclass that `bounded_protocol` makes."""

    limits: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._raw_bytes = 0  # received since the head began
        self._parsed_bytes = 0  # of complete lines
        self._refusal: ApiError | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(
                ApiError(503, "Too many connections.", code="too_many_connections", headers=retry_after(1) + CLOSE)
            )
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
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
