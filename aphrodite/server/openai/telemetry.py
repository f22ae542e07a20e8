"""What a stream's chunks tell of its own computing beside their choices: usage so far, and in llama.cpp's words
`timings` and `prompt_progress`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aphrodite.outputs import RequestOutput
from aphrodite.server.generation import UsageCounter
from aphrodite.server.openai.protocol import ChatFields, CompletionFields


class Telemetry:
    """Of one stream.

    Args:
        usage: each chunk has the token counts so far.
        per_token: each chunk has the timings so far.
        at_end: the end of each answer has them.
        progress: events before an answer tell how much of its prompt is computed.

    Attributes:
        every_chunk: each chunk has something to tell.
    """

    def __init__(
        self,
        counter: UsageCounter,
        *,
        usage: bool = False,
        per_token: bool = False,
        at_end: bool = False,
        progress: bool = False,
    ) -> None:
        self._counter = counter
        self._counts = usage
        self._per_token = per_token
        self._at_end = at_end or per_token
        self._progress = progress
        self._answered: set[int] = set()  # prompts whose answers have begun
        self.every_chunk = usage or per_token

    @classmethod
    def of(cls, fields: ChatFields | CompletionFields, counter: UsageCounter) -> Telemetry:
        """As a request of OpenAI's kind asks for it."""
        return cls(
            counter,
            usage=fields.stream_options.continuous_usage_stats,
            per_token=fields.timings_per_token,
            at_end=fields.return_timings,
            progress=fields.return_progress,
        )

    def usage(self) -> dict[str, Any] | None:
        """A chunk's `usage`, if each has one."""
        return self._counter.usage() if self._counts else None

    def timings(self, *, finished: bool) -> dict[str, Any]:
        """What stands beside a piece of an answer, or what comes at its end."""
        return {"timings": self._counter.timings()} if self._per_token or (finished and self._at_end) else {}

    def progress(self, prompt: int, output: RequestOutput, write: Callable[[dict[str, Any]], bytes]) -> bytes:
        """The event of a prompt's progress, which `write` makes of what stands beside its choice; b"" for none."""
        if not self._progress or prompt in self._answered:
            return b""
        if output.outputs:
            self._answered.add(prompt)
        return write({"prompt_progress": self._counter.progress(prompt, output)})
