"""Server-sent events written straight to ASGI: one write for what is ready, nothing between it and the socket."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aphrodite.server.errors import ApiError, ClientDisconnectedError, Headers, to_api_error
from aphrodite.server.supervise import Supervisor

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

_HEADERS: Headers = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _openai_failure(error: ApiError) -> bytes:
    return event(error.encode())


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """What of a protocol's streams is not the events themselves."""

    media_type: bytes = b"text/event-stream; charset=utf-8"
    mark: bytes = DONE  # behind the last event
    ping: bytes = PING  # in silence; empty where the protocol has nothing that clients pass over
    failure: Callable[[ApiError], bytes] = _openai_failure  # the event of an error in mid-stream


OPENAI_FORMAT = StreamFormat()


class EventSink(Protocol):
    """Where an answer's events go."""

    async def write(self, data: bytes) -> None:
        """Take whole events."""


class EventStream:
    """One response's way out. The status line goes with the first write, so that early errors keep their status."""

    def __init__(self, send: Send, headers: Headers = (), format: StreamFormat = OPENAI_FORMAT) -> None:
        self.started = False
        self.last_write = time.monotonic()
        self.writing = False
        self._send = send
        self._headers = headers
        self._format = format

    async def write(self, data: bytes) -> None:
        """Send whole events; waits while the client does not read."""
        if not self.started:
            self.started = True
            headers = [(b"content-type", self._format.media_type), *_HEADERS, *self._headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.writing = True
        self.last_write = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self.writing = False

    async def end(self) -> None:
        """The end mark and the response's end."""
        await self.write(self._format.mark)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """What went wrong in mid-stream, as the last event before the end mark."""
        await self.write(self._format.failure(error))
        await self.end()


class EventResponse:
    """An ASGI response whose events `produce` writes while its client is being watched."""

    def __init__(
        self,
        produce: Callable[[EventStream], Coroutine[Any, Any, None]],
        supervisor: Supervisor,
        *,
        write_timeout: float,
        headers: Headers = (),
        format: StreamFormat = OPENAI_FORMAT,
    ) -> None:
        self._produce = produce
        self._supervisor = supervisor
        self._write_timeout = write_timeout
        self._headers = headers
        self._format = format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send, self._headers, self._format)

        async def work() -> None:
            await self._produce(stream)
            await stream.end()

        async def tick() -> None:
            if not stream.writing:
                if self._format.ping:
                    await stream.write(self._format.ping)
            elif time.monotonic() - stream.last_write > self._write_timeout:
                raise ClientDisconnectedError

        try:
            await self._supervisor.run(work(), receive, tick)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            if not stream.started:
                raise
            with contextlib.suppress(TimeoutError):  # the client may have stopped reading
                async with asyncio.timeout(self._write_timeout):
                    await stream.fail(to_api_error(error, scope["state"]["request_id"]))


class EarlyStream:
    """A stream that may have to begin before its endpoint can answer, because the request's model is being loaded.

    Once it has begun, the endpoint's own events follow; its headers come too late, and errors are events.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._stream: EventStream | None = None
        self._answered = False  # the endpoint's own response has begun

    @property
    def unanswered(self) -> bool:
        """The client has been told of nothing but that there will be events."""
        return self._stream is not None and not self._answered

    async def ping(self, format: StreamFormat) -> None:
        """Say that the server is there."""
        if self._stream is None:
            self._stream = EventStream(self._send, (), format)
        await self._stream.write(format.ping)

    async def send(self, message: Message) -> None:
        """Pass the endpoint's response on."""
        if message["type"] == "http.response.start":
            self._answered = True
            if self._stream is not None:
                return
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """What went wrong before the endpoint answered."""
        if self._stream is not None:
            await self._stream.fail(error)


class EarlyStreams:
    """ASGI wrapper: an `EarlyStream` for each request, in `scope["state"]["early"]`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        early = EarlyStream(send)
        scope.setdefault("state", {})["early"] = early
        try:
            await self._app(scope, receive, early.send)
        except ClientDisconnectedError:
            raise
        except Exception as error:
            if not early.unanswered:
                raise
            await early.fail(to_api_error(error, scope["state"]["request_id"]))
