"""Answers that are computed whether or not somebody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import ExitStack, aclosing

from starlette.types import Message

from aphrodite.server.errors import to_api_error
from aphrodite.server.openai.responses.answer import Answer, Keep
from aphrodite.server.supervise import Supervisor


class BackgroundAnswer:
    """An answer under way, and what it has told so far.

    Args:
        keep: stores what has become of it.
        hold: let go at its end.
    """

    def __init__(self, answer: Answer, keep: Keep, hold: ExitStack) -> None:
        self._answer = answer
        self._keep = keep
        self._hold = hold
        self._events: list[bytes] = []
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, supervisor: Supervisor, response_id: str) -> None:
        """Begin; `response_id` is what the log calls it."""
        self._task = asyncio.ensure_future(self._compute(supervisor, response_id))
        self._task.add_done_callback(lambda _: self._end())

    async def cancel(self) -> None:
        """End it early; returns when that has been stored."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    @property
    def ended(self) -> bool:
        return self._task is not None and self._task.done()

    def snapshot(self) -> bytes:
        """The response as far as it is."""
        return self._answer.snapshot()

    async def follow(self, begin: int) -> AsyncGenerator[bytes, None]:
        """The events from number `begin` on, those to come with them."""
        while True:
            changed = self._changed
            fresh = self._events[begin:]
            begin += len(fresh)
            if fresh:
                yield b"".join(fresh)
            elif self.ended:
                return
            else:
                await changed.wait()

    async def _compute(self, supervisor: Supervisor, response_id: str) -> None:
        try:
            await supervisor.run(self._record(), _nobody_leaves)
        except asyncio.CancelledError:
            self._tell(self._answer.stop(None))
        except Exception as error:
            self._tell(self._answer.stop(to_api_error(error, response_id)))
        if self._answer.ending is not None:
            self._keep(self._answer.ending, tuple(self._events))

    async def _record(self) -> None:
        async with aclosing(self._answer.events()) as told:
            async for lines in told:
                self._tell(lines)

    def _tell(self, lines: Iterable[bytes]) -> None:
        self._events += lines
        self._wake()

    def _end(self) -> None:
        self._hold.close()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _nobody_leaves() -> Message:
    """`receive` of a client that stays."""
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}
