"""Streams that outlive their connection: a client that lost it continues behind the last event that it has.

Events are numbered (`id:` of server-sent events, https://html.spec.whatwg.org/multipage/server-sent-events.html) and
kept for a while. `GET /v1/streams/{id}` with `Last-Event-ID` tells those that follow, old and new alike. An answer
that nobody has listened to for that while is ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message

from aphrodite.server.errors import ApiError, Headers, invalid, retry_after, unsupported
from aphrodite.server.responses import json_response
from aphrodite.server.sse import OPENAI_FORMAT, EventResponse, EventSink, EventStream, StreamFormat
from aphrodite.server.supervise import Supervisor

MAX_STREAMS = 1024
MAX_BYTES = 128 * 2**20  # of all events that are kept
_EVENT_BYTES = 64  # what an event takes beside its text

Produce = Callable[[EventSink], Coroutine[Any, Any, None]]


class ResumableStream:
    """One answer's events, computed whether or not somebody listens.

    Attributes:
        name: the response's id.
        key: digest of the API key that it was asked for with; None: of nobody in particular.
        format: of its responses.
        size: bytes that are held.
    """

    def __init__(self, name: str, key: bytes | None, format: StreamFormat, store: StreamStore) -> None:
        self.name = name
        self.key = key
        self.format = format
        self.size = 0
        self._store = store
        self._events: deque[bytes] = deque()
        self._last = 0  # number of the newest event
        self._changed = asyncio.Event()
        self._unwanted = asyncio.Event()
        self._num_listeners = 0
        self._task: asyncio.Task[None] | None = None

    def start(self, produce: Produce, supervisor: Supervisor) -> None:
        """Begin to compute the events."""
        self._task = asyncio.ensure_future(supervisor.run(produce(self), self._receive))
        self._task.add_done_callback(self._end)

    def stop(self) -> None:
        """End the answer, if it has not ended."""
        self._unwanted.set()

    @property
    def idle(self) -> bool:
        """Nobody listens."""
        return self._num_listeners == 0

    @property
    def ended(self) -> bool:
        return self._task is not None and self._task.done()

    async def write(self, data: bytes) -> None:
        """Keep whole events."""
        for text in data.split(b"\n\n")[:-1]:
            self._last += 1
            event = b"id: %d\n%b\n\n" % (self._last, text)
            self._events.append(event)
            self.size += len(event) + _EVENT_BYTES
            self._store.grew(self, len(event) + _EVENT_BYTES)
        self._wake()

    def drop_oldest(self) -> int:
        """Forget an event; returns the bytes that it held."""
        freed = len(self._events.popleft()) + _EVENT_BYTES
        self.size -= freed
        return freed

    def check(self, after: int) -> None:
        """Refuse a number behind which this stream cannot go on.

        Raises:
            ApiError: 400 or 410.
        """
        if after > self._last:
            raise invalid("Last-Event-ID", f"is {after}, but the newest event of this stream is number {self._last}")
        if after < self._last - len(self._events):
            raise ApiError(
                410, f"The events behind number {after} of this stream are not kept any more.", code="events_expired"
            )

    async def follow(self, events: EventStream, after: int) -> None:
        """Tell all events behind number `after`, to the end.

        Raises:
            Exception: what ended the answer early.
        """
        self._num_listeners += 1
        self._store.watch(self)
        try:
            while not self._unwanted.is_set():
                changed = self._changed
                self.check(after)
                fresh = b"".join(islice(self._events, len(self._events) - (self._last - after), None))
                after = self._last
                if fresh:
                    await events.write(fresh)
                elif self._task is not None and self._task.done():
                    self._task.result()
                    return
                else:
                    await changed.wait()
        finally:
            self._num_listeners -= 1
            self._store.watch(self)

    def _end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # for listeners, of whom there may be none
        self._wake()
        self._store.watch(self)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _receive(self) -> Message:
        """What the supervisor sees of the client: that it left when nobody wants the answer any more."""
        await self._unwanted.wait()
        return {"type": "http.disconnect"}


class StreamStore:
    """All streams that can be continued.

    Args:
        seconds: how long one is kept while nobody listens; 0: there are none.
        write_timeout: of their responses, see `EventResponse`.
    """

    def __init__(self, seconds: float, supervisor: Supervisor, *, write_timeout: float) -> None:
        self._seconds = seconds
        self._supervisor = supervisor
        self._write_timeout = write_timeout
        self._streams: dict[str, ResumableStream] = {}  # oldest first
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_bytes(self) -> int:
        """What is held of all streams."""
        return self._num_bytes

    def response(
        self,
        request: Request,
        name: str,
        produce: Produce,
        headers: Headers,
        *,
        resumable: bool,
        format: StreamFormat = OPENAI_FORMAT,
    ) -> ASGIApp:
        """A response of the events that `produce` writes; `name` is by what a resumable one is found again.

        Raises:
            ApiError: 400, such streams are switched off; 429, there are too many.
        """
        if not resumable:
            return self._written(produce, headers, format)
        if not self._seconds:
            raise unsupported("resumable", "this server keeps no streams (--stream-resume-seconds); leave it out")
        if len(self) >= MAX_STREAMS and not self._drop_ended():
            raise ApiError(
                429,
                f"This server keeps at most {MAX_STREAMS} streams; leave out resumable, or try again in a moment.",
                code="too_many_streams",
                headers=retry_after(self._seconds),
            )
        stream = self._streams[name] = ResumableStream(name, _key_of(request), format, self)
        stream.start(produce, self._supervisor)
        self.watch(stream)
        return self._response(stream, 0, (*headers, (b"x-stream-id", name.encode())))

    async def show(self, request: Request) -> ASGIApp:
        """Continue a stream behind the event that `Last-Event-ID` numbers, or else from its beginning."""
        stream = self._find(request)
        value = request.headers.get("last-event-id", "").strip() or "0"
        if not (value.isascii() and value.isdigit() and len(value) < 16):
            raise invalid("Last-Event-ID", "must be the number of an event of this stream")
        stream.check(int(value))
        return self._response(stream, int(value))

    async def delete(self, request: Request) -> Response:
        """End a stream and forget its events."""
        stream = self._find(request)
        self._drop(stream)
        return json_response({"id": stream.name, "object": "stream", "deleted": True})

    def watch(self, stream: ResumableStream) -> None:
        """Forget a stream after a while in which nobody listens; told of whatever happens to one."""
        if (timer := self._timers.pop(stream.name, None)) is not None:
            timer.cancel()
        if stream.idle and stream.name in self._streams:
            loop = asyncio.get_running_loop()
            self._timers[stream.name] = loop.call_later(self._seconds, self._expire, stream)

    def grew(self, stream: ResumableStream, num_bytes: int) -> None:
        """Make room for an event: streams that have ended go first, then the oldest events of the largest stream."""
        if stream.name not in self._streams:
            return
        self._num_bytes += num_bytes
        while self._num_bytes > MAX_BYTES:
            if not self._drop_ended():
                self._num_bytes -= max(self._streams.values(), key=lambda one: one.size).drop_oldest()

    def _find(self, request: Request) -> ResumableStream:
        """The stream that a request names, if it is its key's.

        Raises:
            ApiError: 404.
        """
        stream = self._streams.get(request.path_params["stream_id"])
        if stream is None or stream.key != _key_of(request):
            raise ApiError(404, "There is no such stream, or not any more.", code="stream_not_found")
        return stream

    def _response(self, stream: ResumableStream, after: int, headers: Headers = ()) -> ASGIApp:
        async def tell(events: EventStream) -> None:
            await stream.follow(events, after)

        return self._written(tell, headers, stream.format)

    def _written(
        self, produce: Callable[[EventStream], Coroutine[Any, Any, None]], headers: Headers, format: StreamFormat
    ) -> ASGIApp:
        return EventResponse(
            produce, self._supervisor, write_timeout=self._write_timeout, headers=headers, format=format
        )

    def _expire(self, stream: ResumableStream) -> None:
        if stream.idle and self._streams.get(stream.name) is stream:
            self._drop(stream)

    def _drop_ended(self) -> bool:
        """Forget the oldest stream that has ended and that nobody reads; False if there is none."""
        stream = next((one for one in self._streams.values() if one.ended and one.idle), None)
        if stream is not None:
            self._drop(stream)
        return stream is not None

    def _drop(self, stream: ResumableStream) -> None:
        del self._streams[stream.name]
        self._num_bytes -= stream.size
        if (timer := self._timers.pop(stream.name, None)) is not None:
            timer.cancel()
        stream.stop()


def refuse_resumable(resumable: bool) -> None:
    """Raise ApiError 400 if a whole answer was asked for as a stream that can be continued."""
    if resumable:
        raise invalid("resumable", "is for streams; send stream true, or leave it out")


def _key_of(request: Request) -> bytes | None:
    key: bytes | None = request.scope["state"].get("api_key_digest")
    return key
